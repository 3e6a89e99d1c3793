"""A block of records to token bytes: the work of one worker, with every record accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from megatron_let.data.batch_encoders import BatchEncoder, EncodedTexts, join_encoded
from megatron_let.data.blocks import Block, Position
from megatron_let.data.long_texts import TextTooLong, encode_texts
from megatron_let.data.manifest import SubsetCount
from megatron_let.data.packing import Document, EncodedPart, PackingRules, pack
from megatron_let.data.records import (
    NO_TOKENS,
    NOT_ENCODABLE,
    TOO_LONG_TO_ENCODE,
    Record,
    RejectedRecord,
    records_of,
    subset_of,
    utf8_size,
)

__all__ = [
    "EncodedBlock",
    "EncodedPart",
    "EncodingRules",
    "Skipped",
    "SubsetCount",
    "encode_block",
]


@dataclass(frozen=True)
class EncodingRules:
    """What every block of a run is encoded by."""

    json_keys: tuple[str, ...]
    """Plain text has no keys: it is under the first of these, and missing under the others."""
    dtype: str
    """Numpy name of the type that ids are written in: uint16 or int32."""
    append_eod: bool
    eod: int
    subset_key: str = "meta.pile_set_name"
    """Dotted path to the name of the subset that a record belongs to."""
    split_by_subset: bool = False
    """Give each subset a part of its own."""
    replace_invalid_utf8: bool = False
    """Put U+FFFD where bytes are not UTF-8, instead of rejecting the record."""


@dataclass(frozen=True)
class Skipped:
    """One record that gave no document under a key."""

    record: int
    """Its number in its source, from 1."""
    byte: int
    """Where it begins in its source's content."""
    reason: str


@dataclass(frozen=True)
class EncodedBlock:
    """A block's result. For each key: num_records = documents over its parts + skipped."""

    path: str
    num_bytes: int
    num_records: int
    is_last: bool
    end: Position
    parts: tuple[EncodedPart, ...]
    """By key, then subset; only parts with documents."""
    skipped: Mapping[str, tuple[Skipped, ...]]
    """By JSON key."""


def encode_block(block: Block, rules: EncodingRules, encoder: BatchEncoder) -> EncodedBlock:
    """Encode every record of a block under every key.

    Raises:
        OverflowError: the encoder gave an id that the rules' type does not hold.
    """
    records = list(
        records_of(block, text_key=rules.json_keys[0], replace_invalid_utf8=rules.replace_invalid_utf8)
    )
    path = tuple(rules.subset_key.split("."))
    subsets = [subset_of(record.values, path) for record in records]
    parts: list[EncodedPart] = []
    skipped: dict[str, tuple[Skipped, ...]] = {}
    for key in rules.json_keys:
        key_parts, key_skipped = _encode_key(records, subsets, key, rules, encoder)
        num_documents = sum(part.num_documents for part in key_parts)
        assert len(records) == num_documents + len(key_skipped), f"{block.path}: a record is unaccounted for"
        parts += key_parts
        skipped[key] = tuple(sorted(key_skipped, key=attrgetter("record")))
    return EncodedBlock(
        path=block.path,
        num_bytes=len(block.content),
        num_records=len(records),
        is_last=block.is_last,
        end=block.end,
        parts=tuple(parts),
        skipped=skipped,
    )


def _encode_key(
    records: Sequence[Record], subsets: Sequence[str], key: str, rules: EncodingRules, encoder: BatchEncoder
) -> tuple[list[EncodedPart], list[Skipped]]:
    documents, skipped = _documents_of(records, subsets, key)
    if rules.split_by_subset:  # a stable order: each subset in one piece, its documents as they came
        documents.sort(key=attrgetter("subset"))
    documents, encoded, refused = _encode_documents(documents, encoder)
    skipped += refused
    for document in documents:  # a huge text is gone before its tokens are copied
        document.texts.clear()
    packing_rules = PackingRules(rules.dtype, rules.append_eod, rules.eod)
    parts: list[EncodedPart] = []
    for subset, group, group_encoded in _groups(documents, encoded, rules.split_by_subset):
        part, empty = pack(group, group_encoded, packing_rules, key=key, subset=subset)
        skipped += [Skipped(document.record, document.byte, NO_TOKENS) for document in empty]
        if part is not None:
            parts.append(part)
    return parts, skipped


def _documents_of(
    records: Sequence[Record], subsets: Sequence[str], key: str
) -> tuple[list[Document], list[Skipped]]:
    """Move the texts under `key` from the records into documents."""
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for record, subset in zip(records, subsets, strict=True):
        try:
            texts = record.take_texts(key)
            documents.append(
                Document(record.number, record.byte, texts, len(texts), utf8_size(texts), subset)
            )
        except RejectedRecord as rejected:
            skipped.append(Skipped(record.number, record.byte, rejected.reason))
    return documents, skipped


def _encode_documents(
    documents: list[Document], encoder: BatchEncoder
) -> tuple[list[Document], EncodedTexts, list[Skipped]]:
    """Return the documents that the tokenizer takes, the ids of their texts, and what it refuses."""
    try:
        return documents, encode_texts(encoder, [text for item in documents for text in item.texts]), []
    except ValueError:
        pass
    taken: list[Document] = []
    refused: list[Skipped] = []
    pieces: list[EncodedTexts] = []
    for document in documents:
        try:
            pieces.append(encode_texts(encoder, document.texts))
            taken.append(document)
        except TextTooLong:
            refused.append(Skipped(document.record, document.byte, TOO_LONG_TO_ENCODE))
        except ValueError:
            refused.append(Skipped(document.record, document.byte, NOT_ENCODABLE))
    return taken, join_encoded(pieces), refused


def _groups(
    documents: list[Document], encoded: EncodedTexts, split: bool
) -> Iterator[tuple[str | None, list[Document], EncodedTexts]]:
    """Yield the documents with their ids: all at once, or subset by subset where they are sorted by it."""
    if not split:
        yield None, documents, encoded
        return
    first_text, first_token = 0, 0
    for subset, members in groupby(documents, key=attrgetter("subset")):
        group = list(members)
        lengths = encoded.lengths[first_text : first_text + sum(item.num_texts for item in group)]
        num_tokens = int(lengths.sum())
        yield subset, group, EncodedTexts(encoded.ids[first_token : first_token + num_tokens], lengths)
        first_text, first_token = first_text + len(lengths), first_token + num_tokens
