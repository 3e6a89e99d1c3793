"""Standard input as a pipe that a slow program writes into."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

_PART_BYTES = 999


@contextmanager
def piped_standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Iterator[None]:
    """Make standard input a pipe into which the content comes in small parts."""
    reading, writing = os.pipe()

    def write_all() -> None:
        with suppress(BrokenPipeError), open(writing, "wb", buffering=0) as stream:
            for begin in range(0, len(content), _PART_BYTES):
                stream.write(content[begin : begin + _PART_BYTES])

    thread = threading.Thread(target=write_all)
    thread.start()
    with monkeypatch.context() as patch, open(reading, encoding="utf-8") as stream:
        patch.setattr(sys, "stdin", stream)
        yield
    thread.join(10)
    assert not thread.is_alive()
