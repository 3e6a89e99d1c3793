"""Blocks encoded character by character, so that ids can be told by eye, and their account checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_let.data.batch_encoders import BatchEncoder, EncodedTexts, join_ids
from megatron_let.data.blocks import START, Block, RecordKind
from megatron_let.data.encoding import (
    EncodedBlock,
    EncodedPart,
    EncodingRules,
    Skipped,
    encode_block,
)
from megatron_let.data.manifest import SubsetCount

RULES = EncodingRules(json_keys=("text",), dtype="uint16", append_eod=True, eod=0)


class CharacterEncoder(BatchEncoder):
    """One id a character; a text of spaces has none; a text with ! is refused."""

    is_local = False

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        if any("!" in text for text in texts):
            raise ValueError("no !")
        return join_ids([ord(character) for character in text.strip(" ")] for text in texts)


def block_of(
    content: bytes, kind: RecordKind = RecordKind.JSON_LINES, *, record: int = 1, byte: int = 0
) -> Block:
    return Block(
        path="input",
        kind=kind,
        first_record=record,
        first_byte=byte,
        content=content,
        too_long=False,
        is_last=True,
        end=START,
    )


def encode(
    content: bytes, rules: EncodingRules = RULES, encoder: BatchEncoder | None = None
) -> tuple[EncodedPart | None, tuple[Skipped, ...]]:
    """Encode a file of one block and check its account; return its part, if any, and what was skipped."""
    block = encode_block(block_of(content), rules, encoder or CharacterEncoder())
    assert block.num_records == content.count(b"\n") + (content[-1:] != b"\n")
    check_account(block, rules)
    assert len(block.parts) <= 1
    return (block.parts[0] if block.parts else None), block.skipped[rules.json_keys[0]].first


def check_account(block: EncodedBlock, rules: EncodingRules) -> None:
    for key in rules.json_keys:
        parts = [part for part in block.parts if part.key == key]
        assert block.num_records == sum(part.num_documents for part in parts) + block.skipped[key].total
    for part in block.parts:
        tokens = np.frombuffer(part.tokens, rules.dtype)
        lengths = np.frombuffer(part.lengths, np.int32)
        counts = np.frombuffer(part.sequence_counts, np.int32)
        assert part.num_tokens == len(tokens) == lengths.sum() > 0
        assert lengths.min() > 0
        assert counts.min() > 0
        assert len(lengths) == counts.sum()
        assert part.max_token_id == tokens.max()
        total = sum(part.subset_counts.values(), SubsetCount())
        assert total == SubsetCount(part.num_documents, part.num_tokens, part.text_bytes)


def ids_of(part: EncodedPart | None) -> list[int]:
    assert part is not None
    ids: list[int] = np.frombuffer(part.tokens, np.uint16).tolist()
    return ids


GOOD = b'{"text": "ab", "other": 1}\n'
