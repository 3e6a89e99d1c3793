"""An input's bytes as they stand on disk: read in pieces of one size, counted, hashed and compared with an earlier run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_let.data.blocks import START, Position
from megatron_let.data.input_rules import STANDARD_INPUT
from megatron_let.errors import ConfigError

READ_BYTES = 1 << 18


class RawStream:
    """The bytes of one input.

    All reads are full ones of the same size, from the first byte on, wherever a run goes on: so the positions at
    which blocks end are the same in every run, from a pipe as well.
    """

    def __init__(
        self,
        stream: BinaryIO,
        name: str,
        *,
        size: int | None = None,
        start: Position = START,
        read_bytes: int = READ_BYTES,
    ) -> None:
        self.name = name
        self.position = 0
        self._stream = stream
        self._size = size
        self._start = start
        self._read_bytes = read_bytes
        self._hash = hashlib.sha256()

    @property
    def is_verified(self) -> bool:
        """Return whether the bytes that an earlier run had read were read again and are the same."""
        return self.position >= self._start.disk_bytes

    def digest(self) -> str:
        """Return the SHA-256 of what has been read, hex."""
        return self._hash.copy().hexdigest()

    def read(self) -> bytes:
        """Return the next piece, empty at the end.

        Raises:
            ConfigError: it cannot be read, differs from what an earlier run had read, or changes its size meanwhile.
        """
        try:
            piece: bytes | None = self._stream.read(self._read_bytes)
        except OSError as error:
            raise ConfigError(f"cannot read input {self.name}: {error.strerror}") from error
        if piece is None:
            raise ConfigError(
                f"input {self.name} does not wait for its writer, so its end cannot be told from a pause (O_NONBLOCK): "
                "put `cat |` before the program"
            )
        if piece:
            self._add(piece)
        elif not self.is_verified:
            raise changed_since_start(self.name)
        elif self._size is not None and self.position < self._size:
            raise self._changed(f"{self.position} now")
        # At once: a writer that keeps ahead would have us read on for ever.
        if self._size is not None and self.position > self._size:
            raise self._changed(f"at least {self.position} now")
        return piece

    def verify_rest(self) -> None:
        """Read on, keeping nothing, until the bytes that an earlier run had read are compared.

        Raises:
            ConfigError: they differ.
        """
        while not self.is_verified:
            self.read()

    def _changed(self, now: str) -> ConfigError:
        return ConfigError(
            f"input {self.name} changed while it was read: {self._size} bytes at the start, {now}; start again when "
            "nothing writes to it any more, preprocessing with --restart"
        )

    def _add(self, piece: bytes) -> None:
        before = self._start.disk_bytes - self.position
        self.position += len(piece)
        if not 0 < before <= len(piece):
            self._hash.update(piece)
            return
        view = memoryview(piece)
        self._hash.update(view[:before])
        if self.digest() != self._start.digest:
            raise changed_since_start(self.name)
        self._hash.update(view[before:])


def changed_since_start(name: str) -> ConfigError:
    """Return the error for an input that is not the one that an earlier run had begun to read."""
    return ConfigError(
        f"input {name} has changed since the run that is being continued began: put the old one back, or give "
        "--restart to begin again"
    )


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a file, or lend standard input, which stays open.

    Raises:
        ConfigError: the file cannot be opened.
    """
    if path == STANDARD_INPUT:
        yield standard_input()
        return
    with _open(path) as stream:
        yield stream


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read input {path}: {error.strerror}") from error


def standard_input() -> BinaryIO:
    """Return standard input as bytes.

    Raises:
        ConfigError: it is closed.
    """
    if sys.stdin is None:
        raise ConfigError("input -: standard input is closed; pipe data into it or name files")
    return sys.stdin.buffer
