"""A block of JSON lines to token bytes: the work of one worker, with every line accounted for."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_let.data.batch_encoders import BatchEncoder
from megatron_let.data.records import (
    NO_TOKENS,
    NOT_ENCODABLE,
    RejectedRecord,
    parse_line,
    texts_of,
    utf8_size,
)
from megatron_let.data.sources import LineBlock, lines_of

# array's own letters: it refuses an id that does not fit, where numpy 1 wraps it into another token.
_ARRAY_TYPE = {"uint16": "H", "int32": "i"}
_NUMPY_TYPE = {letter: name for name, letter in _ARRAY_TYPE.items()}


@dataclass(frozen=True)
class EncodingRules:
    """What every block of a run is encoded by."""

    json_keys: tuple[str, ...]
    dtype: str
    append_eod: bool
    eod: int


@dataclass(frozen=True)
class Skipped:
    """One line that gave no document under a key."""

    line: int
    reason: str


@dataclass(frozen=True)
class EncodedKey:
    """The documents of a block under one key, ready for IndexedWriter.add_documents, and what was skipped."""

    tokens: bytes
    lengths: bytes
    sequence_counts: bytes
    num_tokens: int
    max_token_id: int
    text_bytes: int
    skipped: tuple[Skipped, ...]

    def skipped_by_reason(self) -> Counter[str]:
        """Return how many lines were skipped for each reason."""
        return Counter(item.reason for item in self.skipped)


@dataclass(frozen=True)
class EncodedBlock:
    """A block's result. For each key: num_lines = documents + skipped."""

    path: str
    position: int
    num_bytes: int
    num_lines: int
    keys: Mapping[str, EncodedKey]


@dataclass(frozen=True)
class _Document:
    line: int
    texts: list[str]
    text_bytes: int


def encode_block(block: LineBlock, rules: EncodingRules, encoder: BatchEncoder) -> EncodedBlock:
    """Encode every line of a block under every key."""
    records = list(_records(block))
    return EncodedBlock(
        path=block.path,
        position=block.position,
        num_bytes=len(block.content),
        num_lines=len(records),
        keys={key: _encode_key(records, key, rules, encoder) for key in rules.json_keys},
    )


def _records(block: LineBlock) -> Iterator[tuple[int, dict[str, Any] | RejectedRecord]]:
    """Yield each line's number with its object or why it has none."""
    for line in lines_of(block):
        try:
            yield line.number, parse_line(line)
        except RejectedRecord as rejected:
            yield line.number, rejected


def _encode_key(
    records: Sequence[tuple[int, dict[str, Any] | RejectedRecord]],
    key: str,
    rules: EncodingRules,
    encoder: BatchEncoder,
) -> EncodedKey:
    documents: list[_Document] = []
    skipped: list[Skipped] = []
    for line, record in records:
        try:
            if isinstance(record, RejectedRecord):
                raise record
            texts = texts_of(record, key)
            documents.append(_Document(line, texts, utf8_size(texts)))
        except RejectedRecord as rejected:
            skipped.append(Skipped(line, rejected.reason))
    return _pack(documents, skipped, rules, encoder)


def _pack(
    documents: list[_Document], skipped: list[Skipped], rules: EncodingRules, encoder: BatchEncoder
) -> EncodedKey:
    """Join the documents' ids. Sequences without tokens are left out, as in Megatron; so are such documents."""
    tokens, lengths, counts = array(_ARRAY_TYPE[rules.dtype]), array("i"), array("i")
    text_bytes = 0
    for document, encoded in zip(documents, _encode_documents(documents, encoder), strict=True):
        sequences = [ids for ids in encoded or () if ids]
        if not sequences:
            skipped.append(Skipped(document.line, NOT_ENCODABLE if encoded is None else NO_TOKENS))
            continue
        if rules.append_eod:
            sequences[-1] = [*sequences[-1], rules.eod]
        for ids in sequences:
            tokens.extend(ids)
            lengths.append(len(ids))
        counts.append(len(sequences))
        text_bytes += document.text_bytes
    return EncodedKey(
        tokens=tokens.tobytes(),
        lengths=lengths.tobytes(),
        sequence_counts=counts.tobytes(),
        num_tokens=len(tokens),
        max_token_id=_largest(tokens),
        text_bytes=text_bytes,
        skipped=tuple(sorted(skipped, key=lambda item: item.line)),
    )


def _largest(tokens: array[int]) -> int:
    return int(np.frombuffer(tokens, dtype=_NUMPY_TYPE[tokens.typecode]).max()) if tokens else 0


def _encode_documents(documents: list[_Document], encoder: BatchEncoder) -> Iterator[list[list[int]] | None]:
    """Yield the ids of each document's texts, None where the tokenizer refuses one of them."""
    texts = [text for document in documents for text in document.texts]
    try:
        encoded = iter(encoder.encode_batch(texts))
    except ValueError:
        yield from (_encode_alone(document, encoder) for document in documents)
        return
    for document in documents:
        yield [next(encoded) for _ in document.texts]


def _encode_alone(document: _Document, encoder: BatchEncoder) -> list[list[int]] | None:
    try:
        return encoder.encode_batch(document.texts)
    except ValueError:
        return None
