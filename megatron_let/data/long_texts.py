"""Long texts encoded in pieces, with the ids of the whole: a tokenizer needs tens of bytes of memory for each byte.

A text is cut only where the tokenizer itself shows that the cut makes no difference: it must give the same ids for
the text around the cut as for its two halves, from several starting points. That suffices for a tokenizer whose
choice at one place depends on a limited stretch of text (`BatchEncoder.is_local`): all BPE that splits text into
words, or whose vocabulary has no long repeating pattern across them. A pattern that reaches without bound (a quotation,
from quote to quote) looks the same in every window and is another one in the whole text; so a text is encoded from a
second set of cuts as well, and where the ids differ no cut of it is trusted. Added tokens are never cut, since the halves
of one have other ids. A stretch without any safe cut is encoded whole up to `BatchEncoder.max_whole_bytes`; beyond it
the text is refused, since the memory it takes has no bound.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_let.data.batch_encoders import BatchEncoder, EncodedTexts, join_encoded
from megatron_let.data.long_lines import Text

PIECE_CHARACTERS = 1 << 18
"""Where a piece may end; texts of up to twice as many are not cut: at most 300 MB of the tokenizer's memory."""
# Texts of one call: whatever their length, each takes hundreds of bytes in the tokenizer.
_MAX_TEXTS = 1 << 14
# Before a space that follows a word and precedes another; else, for text without spaces and tokenizers that drop
# or add one, before a line's end or a punctuation mark; at last anywhere. A run of white space stays in one piece.
_PLACES = tuple(map(re.compile, (r"\w(?= \w)", r"\w(?=\n)", r"\w(?=[^\w\s])", r"\S(?=\S)")))
# Characters on either side of a cut that the tokenizer is asked about. Different lengths: tokens that repeat in a
# rhythm would fall on a cut from one starting point and not from the others.
_CONTEXTS = (2000, 1499, 997)
_FIRST_STEP = 16
# Of the pieces that confirm the others: their ends come near those of the others as seldom as can be (golden section).
_OTHER_SIZE = 0.618


class TextTooLong(ValueError):
    """A text that would have to be encoded whole, and is too long for that."""


def encode_texts(
    encoder: BatchEncoder, texts: Sequence[Text], piece_characters: int = PIECE_CHARACTERS
) -> EncodedTexts:
    """Return what `encoder.encode(texts)` does, within bounded memory.

    Raises:
        TextTooLong: more than `encoder.max_whole_bytes` would have to be encoded whole, since there is no safe cut or the
            ids turn out to depend on where it is.
    """
    results: list[EncodedTexts] = []
    for batch in _batches(texts, 2 * piece_characters):
        if len(batch) == 1 and len(batch[0]) > 2 * piece_characters:
            results.append(_encode_long(encoder, batch[0], piece_characters))
        else:
            results.append(encoder.encode([str(text) for text in batch]))
    return results[0] if len(results) == 1 else join_encoded(results)


def pieces_of(encoder: BatchEncoder, text: Text, piece_characters: int) -> Iterator[str]:
    """Yield pieces of the text whose ids, put together, are the ids of the text.

    Raises:
        TextTooLong: there is no safe cut for a long stretch.
    """
    start = 0
    while (left := len(text) - start) > 2 * piece_characters:
        limit = 2 * piece_characters
        window, cut = _find_cut(encoder, text, start, piece_characters, limit)
        if cut is None:
            limit = _characters_within(text, start, encoder.max_whole_bytes)
            window, cut = _find_cut(encoder, text, start, piece_characters, limit)
        if cut is None and left > limit:
            raise TextTooLong(f"no safe cut in {encoder.max_whole_bytes:,} bytes")
        if cut is None:
            break
        yield window[: cut[0]]
        start += cut[1]
    yield text[start:]


def _batches(texts: Sequence[Text], max_characters: int) -> Iterator[Sequence[Text]]:
    """Yield the texts in groups that are encoded in one call each; a longer text is alone."""
    first, size = 0, 0
    for index, text in enumerate(texts):
        is_full = size + len(text) > max_characters or index - first == _MAX_TEXTS
        if is_full and index > first:
            yield texts[first:index]
            first, size = index, 0
        size += len(text)
    if first == 0:
        yield texts
    else:
        yield texts[first:]


def _encode_long(encoder: BatchEncoder, text: Text, piece_characters: int) -> EncodedTexts:
    """Encode a text in pieces, or whole where the ids depend on the cuts."""
    encoded = _encode_in_order(encoder, pieces_of(encoder, text, piece_characters))
    if not encoder.is_local or encoder.separator or _is_confirmed(encoder, text, piece_characters, encoded):
        return encoded
    if _characters_within(text, 0, encoder.max_whole_bytes) < len(text):
        raise TextTooLong("its ids depend on where it is cut")
    return encoder.encode([str(text)])


def _is_confirmed(encoder: BatchEncoder, text: Text, piece_characters: int, encoded: EncodedTexts) -> bool:
    """Return whether other pieces give the same ids. Nothing more is held in memory than a piece."""
    position = 0
    try:
        for piece in pieces_of(encoder, text, max(1, int(piece_characters * _OTHER_SIZE))):
            ids = encoder.encode([piece]).ids
            if not np.array_equal(encoded.ids[position : position + len(ids)], ids):
                return False
            position += len(ids)
    except TextTooLong:
        return False
    return position == len(encoded.ids)


def _encode_in_order(encoder: BatchEncoder, pieces: Iterator[str]) -> EncodedTexts:
    """Return the pieces' ids as those of one text, in 16 bits where they fit, and never held twice."""
    ids = array("H")
    for piece in pieces:
        encoded = encoder.encode([piece]).ids
        if ids.typecode == "H" and len(encoded) and (encoded.min() < 0 or encoded.max() >= 1 << 16):
            ids = array("I" if encoded.dtype == np.uint32 else "q", ids)
        ids.frombytes(encoded.astype(ids.typecode, copy=False).tobytes())
    return EncodedTexts(np.asarray(ids), np.array([len(ids)], dtype=np.int64))


def _characters_within(text: Text, start: int, num_bytes: int) -> int:
    """Return how many characters from `start` on fit into so many bytes of UTF-8."""
    most = text[start : start + num_bytes]
    return len(most.encode("utf-8")[:num_bytes].decode("utf-8", "ignore"))


def _find_cut(
    encoder: BatchEncoder, text: Text, start: int, target: int, limit: int
) -> tuple[str, tuple[int, int] | None]:
    """Return the text from `start` on, and where in it a piece may end and the next one begin, behind `target`."""
    window = text[start : start + limit + max(_CONTEXTS) + 1]
    if not encoder.is_local:
        return window, None
    if encoder.separator:
        end = window.find(encoder.separator, target, limit)
        return window, None if end < 0 else (end, end + len(encoder.separator))
    for place in _PLACES:
        position, step = target, _FIRST_STEP
        while match := place.search(window, position, min(limit, len(window))):
            end = match.end()
            # Without the space: a tokenizer that puts one in front of every text would make it two.
            for next_start in (end, end + 1) if window[end] == " " else (end,):
                if _is_safe(encoder, window, end=end, start=next_start):
                    return window, (end, next_start)
            position, step = end + step, step + step // 2  # a stretch without a safe cut is soon behind
    return window, None


def _is_safe(encoder: BatchEncoder, text: str, *, end: int, start: int) -> bool:
    windows: list[str] = []
    for context in _CONTEXTS:
        first, last = max(end - context, 0), start + context
        windows += [text[first:last], text[first:end], text[start:last]]
    ids = encoder.encode(windows).to_lists()
    return all(
        whole == left + right for whole, left, right in zip(ids[::3], ids[1::3], ids[2::3], strict=True)
    )
