"""A working file of a run: it grows at its end, and a run that goes on cuts it back to what the journal knows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_let.errors import ConfigError

# Read back at a time.
_CHUNK_BYTES = 1 << 22


class GrowingFile:
    """A file that grows at its end, with the digest of all that it holds."""

    def __init__(self, path: Path, *, is_new: bool) -> None:
        self._path = path
        self._stream = path.open("w+b" if is_new else "r+b")
        self._hash = hashlib.sha256()

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hash.update(content)

    def sync(self) -> str:
        """Bring everything to the disk and return the digest."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return self._hash.hexdigest()

    def cut_back(self, size: int, digest: str) -> None:
        """Drop what lies behind `size`. Raises ConfigError when what is left has another digest."""
        if not 0 <= size <= os.fstat(self._stream.fileno()).st_size:
            raise damaged(self._path)
        self._stream.truncate(size)
        for block in self.blocks():
            self._hash.update(block)
        if self._hash.hexdigest() != digest:
            raise damaged(self._path)

    def blocks(self) -> Iterator[bytes]:
        """Yield the content from the beginning; further writing goes on at the end."""
        self._stream.seek(0)
        while block := self._stream.read(_CHUNK_BYTES):
            yield block

    def close(self) -> None:
        self._stream.close()


def damaged(path: Path) -> ConfigError:
    """Return the error for a working file that is not the one that the journal tells of."""
    return ConfigError(f"{path} does not hold what the stopped run wrote: give --restart to begin anew")
