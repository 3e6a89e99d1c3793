"""The optional fast encoder: gigatoken under the tokenizer's own rules, checked against it before and while it runs.

gigatoken is a second implementation of byte-level and SentencePiece BPE. It is taken only where it gives the
reference's ids on texts known to be difficult and on a sample of the input, and from then on the reference encodes
a small share of the texts again: a difference ends the run instead of reaching the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_let.data.batch_encoders import BatchEncoder, EncodedTexts
from megatron_let.data.gigatoken_form import gigatoken_form
from megatron_let.data.hf_directory import first_line
from megatron_let.data.probes import probe_texts
from megatron_let.errors import ConfigError, LetError
from megatron_let.optional import has_gigatoken

ENCODERS = ("auto", "plain", "fast")

# The reference is some 60 times slower, so this share of the characters costs about 6 % of the time.
CHECKED_SHARE = 0.001
# Up to this length a text is checked whole, by the very ids that are written; it pays for itself by its length. Long
# documents come in pieces that are shorter. Beyond it, which takes a megabyte without any place to cut, a piece is
# encoded again by both: the reference would take hundreds of megabytes.
_CHECKED_WHOLE_CHARACTERS = 1 << 21
_CHECKED_PIECE_CHARACTERS = 1 << 14
# Between the places that are checked, so that they are not always the first ones; a prime, to reach all.
_STRIDE = 7919
_SHOWN_CHARACTERS = 60
# gigatoken remembers every word it has seen. Each so many characters the memory is looked at, and the words are
# forgotten when they have taken this much; without a look at it, each so many characters.
_LOOK_CHARACTERS = 1 << 22
_MAX_CACHE_BYTES = 192 << 20
_MIN_LIFE_CHARACTERS = 1 << 24
_BLIND_LIFE_CHARACTERS = 1 << 26
_STATM = "/proc/self/statm"
_PAGE_BYTES = 4096


class GigatokenEncoder(BatchEncoder):
    """Encodes with gigatoken; `reference` says what the ids have to be."""

    def __init__(self, reference: BatchEncoder, checked_share: float = CHECKED_SHARE) -> None:
        """Build from a tokenizer that gigatoken knows; otherwise raises whatever gigatoken does, or ValueError."""
        self.reference = reference
        self.is_local = reference.is_local
        self.separator = reference.separator
        self.max_whole_bytes = reference.max_whole_bytes
        self.checked_share = checked_share
        self._form = gigatoken_form(reference)
        self._credit = 0.0
        self._num_checked = 0
        self._start()

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """See BatchEncoder. Raises LetError where the ids are not the reference's."""
        encoded = self.encode_unchecked(texts)
        num_characters = sum(map(len, texts))
        self._check_share(texts, encoded, num_characters)
        self._bound_memory(num_characters)
        return encoded

    def definition(self) -> bytes:
        """See BatchEncoder."""
        return self.reference.definition()

    def encode_unchecked(self, texts: Sequence[str]) -> EncodedTexts:
        """Return gigatoken's ids, without a look at the reference but for texts that only the reference can encode."""
        if not texts:
            return EncodedTexts(np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64))
        try:
            layout = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        except (
            BaseException
        ) as error:  # a panic in Rust is no Exception, and would end a worker without a word
            if isinstance(error, (Exception, KeyboardInterrupt, SystemExit)):
                raise
            raise _failure(f"gigatoken failed: {error}") from error
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = layout.content.data[offsets[0] : offsets[-1]]
        return self._without_stand_ins(texts, EncodedTexts(ids, np.diff(offsets)))

    def _without_stand_ins(self, texts: Sequence[str], encoded: EncodedTexts) -> EncodedTexts:
        """Put the tokenizer's ids where gigatoken was given others (see gigatoken_form.py)."""
        places = np.flatnonzero(encoded.ids >= self._form.first_stand_in)
        if not len(places):
            return encoded
        ends = np.cumsum(encoded.lengths)
        batch = np.split(encoded.ids, ends[:-1])
        for index in np.unique(np.searchsorted(ends, places, side="right")).tolist():
            batch[index] = self._own_ids(texts[index], batch[index])
        lengths = np.array([len(ids) for ids in batch], dtype=np.int64)
        return EncodedTexts(np.concatenate(batch), lengths)

    def _own_ids(self, text: str, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
        first = self._form.first_stand_in
        places = np.flatnonzero(ids >= first)
        meant = [self._form.stand_ins[int(ids[place]) - first] for place in places]
        pieces = [ids[: places[0]]]
        for own, start, end in zip(meant, places + 1, [*places[1:], len(ids)], strict=True):
            if own is None:
                return self.reference.encode([text]).ids
            pieces += [np.array(own, dtype=ids.dtype), ids[start:end]]
        return np.concatenate(pieces)

    def __reduce__(self) -> tuple[type[GigatokenEncoder], tuple[BatchEncoder, float]]:
        """Build again from the reference in the other process."""
        return GigatokenEncoder, (self.reference, self.checked_share)

    def _start(self) -> None:
        from gigatoken import Tokenizer

        self._tokenizer: Any = Tokenizer.from_json(self._form.definition)
        self._characters_since_start = 0
        self._characters_since_look = 0
        self._bytes_at_start = _resident_bytes()

    def _check_share(self, texts: Sequence[str], encoded: EncodedTexts, num_characters: int) -> None:
        """Encode some of the texts again until the share checked so far is no longer behind."""
        self._credit += self.checked_share * num_characters
        while self._credit > 0 and num_characters:
            self._num_checked += 1
            index = self._num_checked * _STRIDE % len(texts)
            text = texts[index]
            if len(text) <= _CHECKED_WHOLE_CHARACTERS:
                start = int(encoded.lengths[:index].sum())
                ids = encoded.ids[start : start + int(encoded.lengths[index])].tolist()
            else:
                start = self._num_checked * _STRIDE % (len(text) - _CHECKED_PIECE_CHARACTERS)
                text = text[start : start + _CHECKED_PIECE_CHARACTERS]
                ids = self.encode_unchecked([text]).ids.tolist()
            self._credit -= max(len(text), 1)
            difference = _difference(text, ids, self.reference.encode([text]).ids.tolist())
            if difference:
                raise _failure(f"gigatoken differs from the tokenizer: {difference}")

    def _bound_memory(self, num_characters: int) -> None:
        self._characters_since_start += num_characters
        self._characters_since_look += num_characters
        if self._characters_since_look < _LOOK_CHARACTERS:
            return
        self._characters_since_look = 0
        if self._bytes_at_start is None:
            if self._characters_since_start >= _BLIND_LIFE_CHARACTERS:
                self._start()
        elif self._characters_since_start >= _MIN_LIFE_CHARACTERS:
            resident = _resident_bytes()
            if resident is not None and resident - self._bytes_at_start > _MAX_CACHE_BYTES:
                self._start()


def choose_encoder(
    reference: BatchEncoder, texts_sample: Sequence[str], backend: str
) -> tuple[BatchEncoder, str]:
    """Return the encoder to use and a line that says which it is and why.

    texts_sample: texts of the very input, on which the fast encoder must give the reference's ids.
    backend: plain (the reference), fast (gigatoken or an error) or auto (gigatoken where it gives the same ids).

    Raises:
        ConfigError: fast was asked for and cannot be had.
    """
    if backend not in ENCODERS:
        raise ConfigError(f"--encoder {backend} is not one of {', '.join(ENCODERS)}")
    if backend == "plain":
        return reference, "encoder: plain"
    encoder, note = _fast_or_reason(reference, texts_sample)
    if encoder is not None:
        return encoder, f"encoder: gigatoken, {note}"
    if backend == "fast":
        raise ConfigError(f"--encoder fast cannot be had: {note}; use --encoder auto or plain")
    return reference, f"encoder: plain, since {note}"


def _fast_or_reason(
    reference: BatchEncoder, texts_sample: Sequence[str]
) -> tuple[GigatokenEncoder | None, str]:
    if not has_gigatoken():
        return None, "gigatoken is not installed"
    try:
        encoder = GigatokenEncoder(reference)
        difference = first_difference(encoder, [*probe_texts(reference), *texts_sample])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return None, f"gigatoken does not take this tokenizer: {first_line(error)}"
    if difference:
        return None, f"gigatoken differs from the tokenizer: {difference}"
    num_characters = sum(map(len, texts_sample))
    return encoder, f"with the tokenizer's ids on all probes and {num_characters:,} characters of the input"


def first_difference(encoder: GigatokenEncoder, texts: Sequence[str]) -> str:
    """Return the first text that gigatoken encodes in its own way and where, or an empty string."""
    fast = encoder.encode_unchecked(texts).to_lists()
    expected = encoder.reference.encode(texts).to_lists()
    for text, ids, expected_ids in zip(texts, fast, expected, strict=True):
        difference = _difference(text, ids, expected_ids)
        if difference:
            return difference
    return ""


def _difference(text: str, ids: list[int], expected: list[int]) -> str:
    if ids == expected:
        return ""
    place = next(index for index, (left, right) in enumerate(zip_longest(ids, expected)) if left != right)
    found, wanted = (repr(items[place]) if place < len(items) else "none" for items in (ids, expected))
    shown = ascii(text[:_SHOWN_CHARACTERS]) + ("..." if len(text) > _SHOWN_CHARACTERS else "")
    return f"token {place} of {shown} is {found} instead of {wanted}"


def _failure(message: str) -> LetError:
    return LetError(f"{message}; run again with --encoder plain")


def _resident_bytes() -> int | None:
    """Return this process's memory, None where the system does not tell."""
    try:
        with open(_STATM, "rb") as stream:
            return int(stream.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return None
