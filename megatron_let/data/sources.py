"""Input files as blocks of whole lines: plain, gzip or zstd by their first bytes, never by their name.

Only blocks travel on, so memory stays bounded by the block size and the longest line.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_let.data.manifest import SourceFile
from megatron_let.errors import ConfigError
from megatron_let.optional import has_zstandard

BLOCK_BYTES = 1 << 18
# Small, because one compressed chunk is expanded at once.
_COMPRESSED_CHUNK_BYTES = 1 << 16

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_REFUSED = {
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
}


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of one file, in order. Only the last line of a file may lack its newline."""

    path: str
    first_line: int
    """Number of the block's first line in its file, from 1."""
    content: bytes
    position: int
    """Bytes of the file on disk that were read when this block was cut (compressed ones, where it is)."""


@dataclass(frozen=True)
class Line:
    """One line of a file, without its newline."""

    number: int
    content: bytes
    is_cut: bool
    """It had no newline: the file ends here, perhaps too early."""


def lines_of(block: LineBlock) -> Iterator[Line]:
    """Yield the block's lines."""
    lines = block.content.split(b"\n")
    cut = lines.pop()
    for number, content in enumerate(lines, start=block.first_line):
        yield Line(number, content, is_cut=False)
    if cut:
        yield Line(block.first_line + len(lines), cut, is_cut=True)


def find_sources(paths: Sequence[str]) -> tuple[SourceFile, ...]:
    """Check the input files before any work and return them with their sizes.

    Raises:
        ConfigError: no input, a path that is not a file, an empty file, a file given twice, another format.
    """
    if not paths:
        raise ConfigError("--input names no file")
    seen: set[Path] = set()
    for path in paths:
        if not os.path.isfile(path):
            raise ConfigError(f"input {path} is not a file")
        if Path(path).resolve() in seen:
            raise ConfigError(f"input {path} is given twice: its documents would be counted twice")
        seen.add(Path(path).resolve())
        _check_format(path)
    return tuple(SourceFile(path=str(path), size=Path(path).stat().st_size) for path in paths)


def read_blocks(path: str, block_bytes: int = BLOCK_BYTES) -> Iterator[LineBlock]:
    """Yield the file's lines in blocks of about `block_bytes`, a longer line whole.

    Raises:
        ConfigError: the file cannot be read, or its compressed data is cut off or damaged.
    """
    first_line, parts, size = 1, list[bytes](), 0
    with _open(path) as stream:
        for chunk in _chunks(stream, path, block_bytes):
            parts.append(chunk)
            size += len(chunk)
            if size < block_bytes or b"\n" not in chunk:
                continue
            end = chunk.rindex(b"\n") + 1
            content = b"".join([*parts[:-1], chunk[:end]])
            yield LineBlock(path, first_line, content, stream.tell())
            first_line += content.count(b"\n")
            parts, size = [chunk[end:]], len(chunk) - end
        content = b"".join(parts)
        if content:
            yield LineBlock(path, first_line, content, stream.tell())


def _check_format(path: str) -> None:
    with _open(path) as stream:
        start = stream.read(8)
    if not start:
        raise ConfigError(f"input {path} is empty")
    for magic, kind in _REFUSED.items():
        if start.startswith(magic):
            raise ConfigError(f"input {path} is {kind}, not JSON lines (plain, .gz or .zst)")
    if start.startswith(_ZSTD) and not has_zstandard():
        raise ConfigError(
            f"input {path} is compressed with zstd: install the package zstandard or decompress it"
        )


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read input {path}: {error.strerror}") from error


def _chunks(stream: BinaryIO, path: str, chunk_bytes: int) -> Iterator[bytes]:
    """Yield the decompressed content. Nothing may end early without an error: that would be lost data."""
    magic = stream.read(4)
    stream.seek(0)
    try:
        if magic.startswith(_GZIP):
            yield from _gzip_chunks(stream, chunk_bytes)
        elif magic.startswith(_ZSTD):
            yield from _zstd_chunks(stream)
        else:
            while chunk := stream.read(chunk_bytes):
                yield chunk
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"input {path} is cut off or damaged near byte {stream.tell()}: {error}") from error


def _gzip_chunks(stream: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=stream, mode="rb") as content:
        while chunk := content.read(chunk_bytes):
            yield chunk


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the frames' content. The library's own reader takes a cut-off file for a whole one; this does not."""
    import zstandard

    pending = stream.read(_COMPRESSED_CHUNK_BYTES)
    while pending:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        while not frame.eof:
            pending = pending or stream.read(_COMPRESSED_CHUNK_BYTES)
            if not pending:
                raise EOFError("the last zstd frame has no end")
            try:
                chunk = frame.decompress(pending)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            pending = b""
            if chunk:
                yield chunk
        pending = frame.unused_data or stream.read(_COMPRESSED_CHUNK_BYTES)
