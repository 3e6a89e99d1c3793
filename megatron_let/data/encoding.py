"""A block of records to token bytes: the work of one worker, with every record accounted for."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

from megatron_let.data.batch_encoders import BatchEncoder, EncodedTexts, join_encoded
from megatron_let.data.blocks import Block, Position
from megatron_let.data.long_texts import TextTooLong, encode_texts
from megatron_let.data.manifest import MAX_SKIPPED_EXAMPLES
from megatron_let.data.packing import Document, EncodedPart, PackingRules, pack
from megatron_let.data.records import (
    EXCLUDED_SUBSET,
    HARMLESS,
    NO_TOKENS,
    NOT_ENCODABLE,
    TOO_LONG_TO_ENCODE,
    Record,
    RejectedRecord,
    records_of,
    subset_of,
    utf8_size,
)


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
    excluded_subsets: tuple[str, ...] = ()
    """Subsets whose records are left out."""
    map_documents: bool = False
    """Tell of each document which record it is."""
    list_skipped: bool = False
    """Name every record that gave no document, not the first few alone."""


@dataclass(frozen=True)
class Skipped:
    """One record that gave no document under a key."""

    record: int
    """Its number in its source, from 1."""
    byte: int
    """Where it begins in its source's content."""
    reason: str
    count: int = 1
    """How many records: more than one only for empty lines that follow each other, this being the first."""


@dataclass(frozen=True)
class SkippedCounts:
    """A block's records that gave no document under a key: a block may hold a million of them."""

    by_reason: Mapping[str, int]
    first: tuple[Skipped, ...]
    """At most as many as a manifest names: the first errors, then the first harmless ones, each kind in the records' order."""
    listed: tuple[Skipped, ...] = ()
    """All of them in order, where the rules ask for it."""

    @property
    def total(self) -> int:
        """Return the number of records."""
        return sum(self.by_reason.values())


@dataclass
class _SkippedTally:
    """Counts skipped records, in any order, and keeps the first few."""

    by_reason: Counter[str] = field(default_factory=Counter)
    errors: list[tuple[int, int, str]] = field(default_factory=list)
    harmless: list[tuple[int, int, str]] = field(default_factory=list)
    listed: list[tuple[int, int, str, int]] | None = None
    """All of them, where they are to be listed."""

    def add(self, record: int, byte: int, reason: str, count: int = 1) -> None:
        """Count `count` records of one byte each, or one of any size."""
        self.by_reason[reason] += count
        if self.listed is not None:
            self.listed.append((record, byte, reason, count))
        first = self.harmless if reason in HARMLESS else self.errors
        if len(first) < MAX_SKIPPED_EXAMPLES or record < first[-1][0]:
            for index in range(min(count, MAX_SKIPPED_EXAMPLES)):
                insort(first, (record + index, byte + index, reason))
            del first[MAX_SKIPPED_EXAMPLES:]

    def copy(self) -> _SkippedTally:
        """Return one that goes on by itself."""
        listed = None if self.listed is None else self.listed.copy()
        return _SkippedTally(self.by_reason.copy(), self.errors.copy(), self.harmless.copy(), listed)

    def counts(self) -> SkippedCounts:
        """Return what travels to the writing process."""
        first = [*self.errors, *self.harmless][:MAX_SKIPPED_EXAMPLES]
        listed = tuple(Skipped(*item) for item in sorted(self.listed or ()))
        return SkippedCounts(dict(self.by_reason), tuple(Skipped(*item) for item in first), listed)


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
    skipped: Mapping[str, SkippedCounts]
    """By JSON key."""


def encode_block(block: Block, rules: EncodingRules, encoder: BatchEncoder) -> EncodedBlock:
    """Encode every record of a block under every key. The block's content is let go on the way: it may be huge.

    Raises:
        OverflowError: the encoder gave an id that the rules' type does not hold.
    """
    path = tuple(rules.subset_key.split("."))
    num_bytes = len(block.content)
    records: list[Record] = []
    subsets: list[str] = []
    unusable = _SkippedTally(listed=[] if rules.list_skipped else None)
    for record in records_of(
        block, text_key=rules.json_keys[0], replace_invalid_utf8=rules.replace_invalid_utf8
    ):
        if record.rejection:
            unusable.add(record.number, record.byte, record.rejection, record.repeats)
        elif (subset := subset_of(record.values, path)) in rules.excluded_subsets:
            unusable.add(record.number, record.byte, EXCLUDED_SUBSET)
        else:
            records.append(record)
            subsets.append(subset)
    block.content = b""  # the texts are copies of it
    num_records = len(records) + unusable.by_reason.total()
    parts: list[EncodedPart] = []
    skipped: dict[str, SkippedCounts] = {}
    for key in rules.json_keys:
        tally = unusable.copy()
        key_parts = _encode_key(records, subsets, tally, key, rules, encoder)
        num_documents = sum(part.num_documents for part in key_parts)
        skipped[key] = tally.counts()
        assert num_records == num_documents + skipped[key].total, f"{block.path}: a record is unaccounted for"
        parts += key_parts
    return EncodedBlock(
        path=block.path,
        num_bytes=num_bytes,
        num_records=num_records,
        is_last=block.is_last,
        end=block.end,
        parts=tuple(parts),
        skipped=skipped,
    )


def _encode_key(
    records: Sequence[Record],
    subsets: Sequence[str],
    skipped: _SkippedTally,
    key: str,
    rules: EncodingRules,
    encoder: BatchEncoder,
) -> list[EncodedPart]:
    documents = _documents_of(records, subsets, key, skipped)
    if rules.split_by_subset:  # a stable order: each subset in one piece, its documents as they came
        documents.sort(key=attrgetter("subset"))
    documents, encoded = _encode_documents(documents, encoder, skipped)
    for document in documents:  # a huge text is gone before its tokens are copied
        document.texts.clear()
    packing_rules = PackingRules(rules.dtype, rules.append_eod, rules.eod, rules.map_documents)
    parts: list[EncodedPart] = []
    for subset, group, group_encoded in _groups(documents, encoded, rules.split_by_subset):
        part, empty = pack(group, group_encoded, packing_rules, key=key, subset=subset)
        for document in empty:
            skipped.add(document.record, document.byte, NO_TOKENS)
        if part is not None:
            parts.append(part)
    return parts


def _documents_of(
    records: Sequence[Record], subsets: Sequence[str], key: str, skipped: _SkippedTally
) -> list[Document]:
    """Move the texts under `key` from the records into documents."""
    documents: list[Document] = []
    for record, subset in zip(records, subsets, strict=True):
        try:
            texts = record.take_long_texts(key)
            documents.append(
                Document(record.number, record.byte, texts, len(texts), utf8_size(texts), subset)
            )
        except RejectedRecord as rejected:
            skipped.add(record.number, record.byte, rejected.reason)
    return documents


def _encode_documents(
    documents: list[Document], encoder: BatchEncoder, skipped: _SkippedTally
) -> tuple[list[Document], EncodedTexts]:
    """Return the documents that the tokenizer takes and the ids of their texts."""
    try:
        return documents, encode_texts(encoder, [text for item in documents for text in item.texts])
    except ValueError:
        pass
    taken: list[Document] = []
    pieces: list[EncodedTexts] = []
    for document in documents:
        try:
            pieces.append(encode_texts(encoder, document.texts))
            taken.append(document)
        except TextTooLong:
            skipped.add(document.record, document.byte, TOO_LONG_TO_ENCODE)
        except ValueError:
            skipped.add(document.record, document.byte, NOT_ENCODABLE)
    return taken, join_encoded(pieces)


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
