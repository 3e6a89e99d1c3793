"""Long texts encoded in pieces, with the ids of the whole: a tokenizer needs tens of bytes of memory for each byte.

A text is cut only where the tokenizer itself shows that the cut makes no difference: it must give the same ids for
the text around the cut as for its two halves, from several starting points. That suffices for a tokenizer whose
choice at one place depends on a limited stretch of text (`BatchEncoder.is_local`): all BPE that splits text into
words, or whose vocabulary has no long repeating pattern across them. Added tokens are never cut, since the halves
of one have other ids. A stretch without any safe cut is encoded whole, and memory grows with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_let.data.batch_encoders import BatchEncoder, EncodedTexts, join_encoded

PIECE_CHARACTERS = 1 << 20
"""Where a piece may end; texts of up to twice as many are not cut."""
# How far a cut of either kind is looked for before looking further, in pieces; then to the text's end.
_REACHES = (1, 16)
# Before a space that follows a word and precedes another; else, for text without spaces and tokenizers that drop
# or add one, before a line's end or a punctuation mark. A run of white space stays in one piece.
_PLACES = (re.compile(r"\w(?= \w)"), re.compile(r"\w(?=\n)"), re.compile(r"\w(?=[^\w\s])"))
# Characters on either side of a cut that the tokenizer is asked about. Different lengths: tokens that repeat in a
# rhythm would fall on a cut from one starting point and not from the others.
_CONTEXTS = (2000, 1499, 997)
_FIRST_STEP = 16


def encode_texts(
    encoder: BatchEncoder, texts: Sequence[str], piece_characters: int = PIECE_CHARACTERS
) -> EncodedTexts:
    """Return what `encoder.encode(texts)` does, within bounded memory."""
    results: list[EncodedTexts] = []
    for batch in _batches(texts, 2 * piece_characters):
        if len(batch) == 1 and len(batch[0]) > 2 * piece_characters and encoder.is_local:
            results.append(_encode_in_pieces(encoder, batch[0], piece_characters))
        else:
            results.append(encoder.encode(batch))
    return results[0] if len(results) == 1 else join_encoded(results)


def pieces_of(encoder: BatchEncoder, text: str, piece_characters: int) -> Iterator[str]:
    """Yield pieces of the text whose ids, put together, are the ids of the text."""
    start = 0
    while len(text) - start > 2 * piece_characters:
        cut = _find_cut(encoder, text, start, piece_characters)
        if cut is None:
            break
        yield text[start : cut[0]]
        start = cut[1]
    yield text[start:]


def _batches(texts: Sequence[str], max_characters: int) -> Iterator[Sequence[str]]:
    """Yield the texts in groups that are encoded in one call each; a longer text is alone."""
    first, size = 0, 0
    for index, text in enumerate(texts):
        if size + len(text) > max_characters and index > first:
            yield texts[first:index]
            first, size = index, 0
        size += len(text)
    if first == 0:
        yield texts
    else:
        yield texts[first:]


def _encode_in_pieces(encoder: BatchEncoder, text: str, piece_characters: int) -> EncodedTexts:
    ids = [_narrow(encoder.encode([piece])) for piece in pieces_of(encoder, text, piece_characters)]
    joined = np.concatenate(ids)
    return EncodedTexts(joined, np.array([len(joined)], dtype=np.int64))


def _narrow(encoded: EncodedTexts) -> np.ndarray:
    """Return the ids in 16 bits where they fit: the whole text's are held at once."""
    fits = not len(encoded.ids) or (encoded.ids.min() >= 0 and encoded.ids.max() < 1 << 16)
    return encoded.ids.astype(np.uint16) if fits else encoded.ids


def _find_cut(
    encoder: BatchEncoder, text: str, piece_start: int, piece_characters: int
) -> tuple[int, int] | None:
    """Return where the piece that begins at `piece_start` may end and the next one begin; near, if possible."""
    target = piece_start + piece_characters
    for limit in (*(target + reach * piece_characters for reach in _REACHES), len(text)):
        for place in _PLACES:
            position, step = target, _FIRST_STEP
            while match := place.search(text, position, min(limit, len(text))):
                end = match.end()
                # Without the space: a tokenizer that puts one in front of every text would make it two.
                starts = (end, end + 1) if text[end] == " " else (end,)
                for start in starts:
                    if _is_safe(encoder, text, piece_start=piece_start, end=end, start=start):
                        return end, start
                position, step = end + step, step + step // 2  # a stretch without a safe cut is soon behind
    return None


def _is_safe(encoder: BatchEncoder, text: str, *, piece_start: int, end: int, start: int) -> bool:
    windows: list[str] = []
    for context in _CONTEXTS:
        first, last = max(end - context, piece_start), start + context
        windows += [text[first:last], text[first:end], text[start:last]]
    ids = encoder.encode(windows).to_lists()
    return all(
        whole == left + right for whole, left, right in zip(ids[::3], ids[1::3], ids[2::3], strict=True)
    )
