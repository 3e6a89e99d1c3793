"""SHA-256 of a file, taken while it is read once, in blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from megatron_let.regular_files import open_regular

_BLOCK_BYTES = 1 << 24
_SAMPLE_BYTES = 1 << 16


def sha256_of(path: str | Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return a file's SHA-256 in hex; `on_bytes` is told how many bytes were read each time.

    Raises:
        OSError: the file cannot be read.
    """
    return sha256_while_reading(path, lambda block: on_bytes(len(block)) if on_bytes else None)


def sha256_while_reading(
    path: str | Path, take: Callable[[bytes], None], block_bytes: int = _BLOCK_BYTES
) -> str:
    """Return a file's SHA-256 in hex; `take` receives its content block by block.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as stream:
        return sha256_of_stream(stream, take, block_bytes)


def sha256_of_stream(
    stream: BinaryIO, take: Callable[[bytes], None] = lambda block: None, block_bytes: int = _BLOCK_BYTES
) -> str:
    """Return the SHA-256 in hex of what a stream still holds; see `sha256_while_reading`."""
    digest = hashlib.sha256()
    while block := stream.read(block_bytes):
        digest.update(block)
        take(block)
    return digest.hexdigest()


def add_samples(
    digest: hashlib._Hash, path: Path, samples: int, *, sample_bytes: int = _SAMPLE_BYTES
) -> None:
    """Add samples of a file to a digest, evenly spaced from its first byte to its last.

    Raises:
        OSError: the file cannot be read.
    """
    last = max(0, path.stat().st_size - sample_bytes)
    with open_regular(path) as stream:
        for index in range(samples):
            stream.seek(last * index // (samples - 1))
            digest.update(stream.read(sample_bytes))
