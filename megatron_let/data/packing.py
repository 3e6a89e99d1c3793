"""Encoded documents to the three byte strings that IndexedWriter.add_documents takes, without a loop over tokens.

As in Megatron-LM core_v0.16.1's tool: each text of a document is a sequence, sequences without tokens are left
out, and eod ends the last one that is left. A document without any token is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_let.data.batch_encoders import EncodedTexts
from megatron_let.data.long_lines import Text
from megatron_let.data.manifest import SubsetCount

_IntArray = npt.NDArray[np.int64]
_Ids = npt.NDArray[np.integer[Any]]
_COUNTED_AT_ONCE = 1 << 22


class Document(NamedTuple):
    """A record's texts under one key."""

    record: int
    byte: int
    texts: list[Text]
    """Emptied once they are encoded."""
    num_texts: int
    num_bytes: int
    """UTF-8 size of the texts."""
    subset: str
    """Empty for a record that names none."""


@dataclass(frozen=True)
class EncodedPart:
    """Documents for one output pair, as IndexedWriter.add_documents takes them."""

    key: str
    subset: str | None
    """None unless the output is split by subset; documents that name none are then under the empty string."""
    tokens: bytes
    lengths: bytes
    """int32 [sequences], in tokens."""
    sequence_counts: bytes
    """int32 [documents]."""
    num_tokens: int
    max_token_id: int
    text_bytes: int
    eod_in_text: int
    """How often eod came out of a text itself: an end-of-text marker written out there."""
    places: bytes
    """int64 [documents, 2], record and byte in the source, where the rules ask for it."""
    subset_counts: Mapping[str, SubsetCount]
    """By the name found, whether or not the output is split; documents without a name are under the empty string."""

    @property
    def num_documents(self) -> int:
        """Return the number of documents."""
        return len(self.sequence_counts) // np.dtype(np.int32).itemsize


@dataclass(frozen=True)
class PackingRules:
    """What the ids of every document are made into."""

    dtype: str
    """Numpy name of the type that ids are written in."""
    append_eod: bool
    eod: int
    with_places: bool = False


def pack(
    documents: Sequence[Document], encoded: EncodedTexts, rules: PackingRules, *, key: str, subset: str | None
) -> tuple[EncodedPart | None, list[Document]]:
    """Return the part that the documents make, None when none has a token, and the documents without tokens.

    encoded: one entry for each text of each document, in order.

    Raises:
        OverflowError: an id, or a sequence's length, does not fit its type.
    """
    counts = _sequences_of_each(documents, encoded.lengths)
    has_tokens = counts > 0
    kept = [document for document, keep in zip(documents, has_tokens.tolist(), strict=True) if keep]
    empty = [document for document, keep in zip(documents, has_tokens.tolist(), strict=True) if not keep]
    if not kept:
        return None, empty
    counts = counts[has_tokens]
    lengths = encoded.lengths[encoded.lengths > 0]
    tokens_of_each: _IntArray = np.add.reduceat(lengths, np.cumsum(counts) - counts)
    _require_range(encoded.ids, rules.dtype)
    tokens = _cast(encoded.ids, rules.dtype)
    max_token_id = int(encoded.ids.max())
    if rules.append_eod:
        _require_range(np.array([rules.eod]), rules.dtype)
        max_token_id = max(max_token_id, rules.eod)
        content = _with_eod(tokens, np.cumsum(tokens_of_each), rules.eod)
        lengths[np.cumsum(counts) - 1] += 1
        tokens_of_each = tokens_of_each + 1
    else:
        content = tokens.tobytes()
    _require_range(lengths, "int32")
    part = EncodedPart(
        key=key,
        subset=subset,
        tokens=content,
        lengths=lengths.astype(np.int32).tobytes(),
        sequence_counts=counts.astype(np.int32).tobytes(),
        num_tokens=int(lengths.sum()),
        max_token_id=max_token_id,
        text_bytes=sum(document.num_bytes for document in kept),
        eod_in_text=_count(encoded.ids, rules.eod),
        places=_places(kept) if rules.with_places else b"",
        subset_counts=_subset_counts(kept, tokens_of_each.tolist()),
    )
    return part, empty


def _sequences_of_each(documents: Sequence[Document], lengths: _IntArray) -> _IntArray:
    """Return how many texts of each document have tokens."""
    num_texts = np.fromiter((document.num_texts for document in documents), np.int64, len(documents))
    assert int(num_texts.sum()) == len(lengths), "one length for each text"
    document_of_text = np.repeat(np.arange(len(documents)), num_texts)
    return np.bincount(document_of_text[lengths > 0], minlength=len(documents))


def _require_range(values: npt.NDArray[Any], dtype: str) -> None:
    """Raise OverflowError where a cast would wrap a value into another one."""
    limits = np.iinfo(dtype)
    smallest, largest = int(values.min()), int(values.max())
    if smallest < limits.min or largest > limits.max:
        raise OverflowError(f"{smallest}..{largest} does not fit into {dtype} ({limits.min}..{limits.max})")


def _cast(values: _Ids, dtype: str) -> _Ids:
    """Return values known to fit as that type, the same memory where the size is the same."""
    if values.dtype.itemsize == np.dtype(dtype).itemsize:
        return values.view(dtype)
    return values.astype(dtype)


def _count(ids: _Ids, wanted: int) -> int:
    """Return how often an id occurs, without a mask of the whole."""
    starts = range(0, len(ids), _COUNTED_AT_ONCE)
    return sum(int(np.count_nonzero(ids[first : first + _COUNTED_AT_ONCE] == wanted)) for first in starts)


def _with_eod(tokens: _Ids, ends: _IntArray, eod: int) -> bytes:
    """Return the tokens with eod put in at each end."""
    if len(ends) == 1:  # a long document is alone, and held no more often than need be
        return b"".join([tokens.data, np.array([eod], dtype=tokens.dtype).data])
    result = np.empty(len(tokens) + len(ends), dtype=tokens.dtype)
    is_token = np.ones(len(result), dtype=bool)
    is_token[ends + np.arange(len(ends))] = False
    result[is_token] = tokens
    result[~is_token] = eod
    return result.tobytes()


def _places(documents: Sequence[Document]) -> bytes:
    return np.array([(document.record, document.byte) for document in documents], dtype=np.int64).tobytes()


def _subset_counts(documents: Sequence[Document], num_tokens: Sequence[int]) -> dict[str, SubsetCount]:
    sums: dict[str, list[int]] = {}
    for document, tokens in zip(documents, num_tokens, strict=True):
        entry = sums.setdefault(document.subset, [0, 0, 0])
        entry[0] += 1
        entry[1] += tokens
        entry[2] += document.num_bytes
    return {name: SubsetCount(*entry) for name, entry in sums.items()}
