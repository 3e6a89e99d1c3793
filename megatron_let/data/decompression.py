"""Compressed input to content, in chunks of bounded size. Nothing may end early without an error: that would be lost data.

Neither format is left to its library's own reader: zstd's takes a cut-off file for a whole one, and both expand
whatever they are fed at once, so that 30 kB can become a gigabyte in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from enum import Enum
from typing import Any

from megatron_let.data.raw_stream import RawStream
from megatron_let.errors import ConfigError
from megatron_let.optional import has_zstandard

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

# A gzip member is handed over in slices, because what follows its end is copied back.
_GZIP_SLICE_BYTES = 1 << 15
_GZIP_CHUNK_BYTES = 1 << 18
# RFC 8878: no block holds more content. One block at a time therefore bounds what a call returns.
_ZSTD_BLOCK_BYTES = 1 << 17
_ZSTD_MAX_WINDOW = 1 << 31
_ZSTD_RLE = 1


class Compression(Enum):
    """How an input is compressed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


def compression_of(head: bytes) -> Compression:
    """Return how an input is compressed by its first four bytes, never by its name."""
    if head.startswith(GZIP_MAGIC):
        return Compression.GZIP
    if head.startswith(ZSTD_MAGIC) or _is_skippable(head[:4]):
        return Compression.ZSTD
    return Compression.NONE


def content_chunks(raw: RawStream) -> Iterator[bytes]:
    """Yield the content of plain, gzip or zstd input, told apart by its first bytes.

    Raises:
        ConfigError: it cannot be read, or the compressed data is cut off or damaged.
    """
    source = _ByteReader(raw)
    compression = compression_of(source.peek(4))
    if compression is Compression.GZIP:
        yield from _gzip_chunks(source)
    elif compression is Compression.ZSTD:
        if not has_zstandard():
            raise ConfigError(
                f"input {raw.name} is compressed with zstd: install the package zstandard or decompress it"
            )
        yield from _zstd_chunks(source)
    else:
        while piece := source.take_some():
            yield piece


class _ByteReader:
    """Exact numbers of bytes from a raw stream's pieces."""

    def __init__(self, raw: RawStream) -> None:
        self._raw = raw
        self._piece = b""
        self._offset = 0

    @property
    def position(self) -> int:
        """Return how many bytes have been taken."""
        return self._raw.position - len(self._piece) + self._offset

    def peek(self, size: int) -> bytes:
        """Return the next bytes without taking them, fewer at the end."""
        while len(self._piece) - self._offset < size and (piece := self._raw.read()):
            self._piece, self._offset = self._piece[self._offset :] + piece, 0
        return self._piece[self._offset : self._offset + size]

    def take(self, size: int) -> bytes:
        """Return exactly so many bytes; at the end of the stream they are an error."""
        parts = list[bytes]()
        while size:
            part = self.take_some(size)
            if not part:
                raise self.damage("the compressed data has no end")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def take_some(self, at_most: int | None = None) -> bytes:
        """Return the rest of the piece at hand or else the next one, empty at the end."""
        if self._offset == len(self._piece):
            self._piece, self._offset = self._raw.read(), 0
        begin, size = self._offset, len(self._piece)
        self._offset = size if at_most is None else min(size, begin + at_most)
        return self._piece[begin : self._offset]

    def give_back(self, size: int) -> None:
        """Take the end of what the last `take_some` returned as not taken."""
        assert size <= self._offset, "only bytes of the piece at hand can be given back"
        self._offset -= size

    def damage(self, reason: object) -> ConfigError:
        """Return the error for compressed data that cannot be right."""
        return ConfigError(
            f"input {self._raw.name} is cut off or damaged near byte {self.position}: {reason}; get it again"
        )


def _gzip_chunks(source: _ByteReader) -> Iterator[bytes]:
    """Yield the members' content. Zero bytes after a member are padding."""
    while source.peek(1):
        yield from _gzip_member(source)
        while (padding := source.take_some(_GZIP_SLICE_BYTES)) and not (rest := padding.lstrip(b"\0")):
            pass
        source.give_back(len(rest) if padding else 0)


def _gzip_member(source: _ByteReader) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    while not member.eof:
        pending = source.take_some(_GZIP_SLICE_BYTES)
        if not pending:
            raise source.damage("the last gzip member has no end")
        while pending and not member.eof:
            try:
                chunk = member.decompress(pending, _GZIP_CHUNK_BYTES)
            except zlib.error as error:
                raise source.damage(error) from error
            pending = member.unconsumed_tail
            if chunk:
                yield chunk
    source.give_back(len(member.unused_data))


def _zstd_chunks(source: _ByteReader) -> Iterator[bytes]:
    """Yield the frames' content, skipping the frames that are made to be skipped."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    while magic := source.peek(4):
        if _is_skippable(magic):
            _skip_frame(source)
        elif magic == ZSTD_MAGIC:
            try:
                yield from _zstd_frame(source, decompressor.decompressobj())
            except zstandard.ZstdError as error:
                raise source.damage(error) from error
        else:
            source.take(len(ZSTD_MAGIC))
            raise source.damage("what follows the last zstd frame is not another one")


def _zstd_frame(source: _ByteReader, frame: Any) -> Iterator[bytes]:
    """Yield one frame's content, block by block (RFC 8878, 3.1.1)."""
    start = source.take(len(ZSTD_MAGIC) + 1)
    descriptor = start[-1]
    frame.decompress(start + source.take(_header_bytes(descriptor)))
    is_last = False
    while not is_last:
        header = source.take(3)
        word = int.from_bytes(header, "little")
        is_last, block_type, size = bool(word & 1), word >> 1 & 3, word >> 3
        if size > _ZSTD_BLOCK_BYTES:
            raise source.damage(f"a zstd block of {size} bytes")
        body = source.take(1 if block_type == _ZSTD_RLE else size)
        has_checksum = is_last and descriptor >> 2 & 1
        chunk = frame.decompress(header + body + source.take(4 if has_checksum else 0))
        if chunk:
            yield chunk
    if not frame.eof:
        raise source.damage("a zstd frame goes on after its last block")


def _header_bytes(descriptor: int) -> int:
    """Return how many bytes of a frame's header follow its descriptor: window, dictionary and content size."""
    is_single_segment = descriptor >> 5 & 1
    window = 1 - is_single_segment
    dictionary = (0, 1, 2, 4)[descriptor & 3]
    content_size = (is_single_segment, 2, 4, 8)[descriptor >> 6]
    return window + dictionary + content_size


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and magic[0] >> 4 == 5 and magic[1:] == b"\x2a\x4d\x18"


def _skip_frame(source: _ByteReader) -> None:
    left = int.from_bytes(source.take(8)[4:], "little")
    while left:
        part = source.take_some(left)
        if not part:
            raise source.damage("the last zstd frame has no end")
        left -= len(part)
