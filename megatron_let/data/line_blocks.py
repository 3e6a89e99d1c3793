"""Chunks of content to pieces of whole lines, without a look at the single line, and never more than one block in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Whole records, or one that was too long, or only the end of a source."""

    content: bytes
    num_records: int
    dropped_bytes: int = 0
    """Size of the one record that was too long, its newline included."""
    is_last: bool = False

    @property
    def num_bytes(self) -> int:
        """Return how much of the source's content the piece stands for."""
        return len(self.content) + self.dropped_bytes


def cut_lines(chunks: Iterator[bytes], block_bytes: int, max_line_bytes: int) -> Iterator[Piece]:
    """Yield pieces of at most `block_bytes`, a longer line alone, one above `max_line_bytes` without content.

    The last piece, and only that, has `is_last`. Its last line may lack the newline.
    """
    cutter = _LineCutter(block_bytes, max_line_bytes)
    for chunk in chunks:
        yield from cutter.feed(chunk)
    yield cutter.finish()


def whole_text(chunks: Iterator[bytes], max_bytes: int) -> Piece:
    """Return all content as one record, without content when it is above `max_bytes`, none when there is nothing."""
    parts, size = list[bytes](), 0
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            parts.clear()
        else:
            parts.append(chunk)
    content = b"".join(parts)
    return Piece(content, num_records=min(size, 1), dropped_bytes=size - len(content), is_last=True)


class _LineCutter:
    """Holds back what the chunks so far leave undecided: whole lines short of a block, and the line begun last.

    Held-back content is views of the chunks, joined once; so a long line costs no more than a short one.
    """

    def __init__(self, block_bytes: int, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        # No longer than the longest line: then only a line that fills a block alone can be too long.
        self._target = min(block_bytes, max_line_bytes + 1)
        self._whole = list[memoryview]()
        self._whole_bytes = 0
        self._begun = list[memoryview]()
        self._begun_bytes = 0
        self._is_dropping = False
        self._dropped_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[Piece]:
        """Yield the pieces that this chunk completes."""
        view, begin = memoryview(chunk), 0
        while begin < len(chunk):
            room = max(0, self._target - self._whole_bytes - self._begun_bytes)
            if self._is_dropping:
                end = chunk.find(b"\n", begin) + 1
                self._dropped_bytes += (end or len(chunk)) - begin
                begin = end or len(chunk)
                if end:
                    yield self._dropped()
            elif len(chunk) - begin < room:
                self._hold(chunk, begin)
                begin = len(chunk)
            elif end := chunk.rfind(b"\n", begin, begin + room) + 1:
                yield self._joined(view[begin:end])
                begin = end
            elif self._whole:
                yield self._joined_whole()
            elif end := self._end_of_long_line(chunk, begin):
                yield self._joined(view[begin:end])
                begin = end
            elif self._begun_bytes + len(chunk) - begin > self._max_line_bytes:
                self._drop()
            else:
                self._hold(chunk, begin)
                begin = len(chunk)

    def finish(self) -> Piece:
        """Return the last piece."""
        if self._is_dropping:
            return self._dropped(is_last=True)
        content = b"".join([*self._whole, *self._begun])
        return Piece(content, content.count(b"\n") + bool(self._begun), is_last=True)

    def _hold(self, chunk: bytes, begin: int) -> None:
        view, end = memoryview(chunk), chunk.rfind(b"\n", begin) + 1
        if end:
            self._whole += [*self._begun, view[begin:end]]
            self._whole_bytes += self._begun_bytes + end - begin
            self._begun, self._begun_bytes = [], 0
            begin = end
        if begin < len(chunk):
            self._begun.append(view[begin:])
            self._begun_bytes += len(chunk) - begin

    def _end_of_long_line(self, chunk: bytes, begin: int) -> int:
        """Return where the line begun last ends in the chunk, 0 if not there or not within the limit."""
        return chunk.find(b"\n", begin, begin + self._max_line_bytes - self._begun_bytes + 1) + 1

    def _joined(self, tail: memoryview) -> Piece:
        content = b"".join([*self._whole, *self._begun, tail])
        self._whole, self._whole_bytes = [], 0
        self._begun, self._begun_bytes = [], 0
        return Piece(content, content.count(b"\n"))

    def _joined_whole(self) -> Piece:
        content = b"".join(self._whole)
        self._whole, self._whole_bytes = [], 0
        return Piece(content, content.count(b"\n"))

    def _drop(self) -> None:
        self._is_dropping, self._dropped_bytes = True, self._begun_bytes
        self._begun, self._begun_bytes = [], 0

    def _dropped(self, is_last: bool = False) -> Piece:
        piece = Piece(b"", num_records=1, dropped_bytes=self._dropped_bytes, is_last=is_last)
        self._is_dropping, self._dropped_bytes = False, 0
        return piece
