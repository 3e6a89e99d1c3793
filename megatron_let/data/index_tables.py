"""The three tables of PREFIX.idx, read piece by piece: they may be larger than memory.

Nothing in the file is aligned, and numpy's functions copy a whole unaligned array: take slices or single entries.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_let.data.indexed import HEADER, IndexHeader, read_header
from megatron_let.errors import ConfigError

CHUNK = 1 << 20
"""Entries of a table that are in memory at a time."""


@dataclass(frozen=True)
class IndexTables:
    """A pair of files whose .idx has the size that its header asks for; what the tables say is not yet checked."""

    prefix: str
    header: IndexHeader
    data_size: int
    """Bytes of PREFIX.bin."""

    # Each access maps the file anew: pages once seen do not add up in this program's memory.

    @property
    def lengths(self) -> Any:
        """Return the tokens of each sequence, int32 [sequences]."""
        return self._table("<i4", HEADER.size, self.header.sequences)

    @property
    def pointers(self) -> Any:
        """Return the byte of .bin at which each sequence begins, int64 [sequences]."""
        return self._table("<i8", self.header.pointers_at, self.header.sequences)

    @property
    def bounds(self) -> Any:
        """Return the sequence at which each document begins, and the number of sequences, int64 [documents + 1]."""
        return self._table("<i8", self.header.bounds_at, self.header.bounds)

    @property
    def documents(self) -> int:
        """Return the number of documents, empty ones included."""
        return self.header.bounds - 1

    def document_ends(self) -> Iterator[Any]:
        """Yield where documents end, in tokens from the start of .bin: int64 arrays, all documents in order.

        Raises:
            ConfigError: a document ends at a sequence that is not there, or before its begin.
        """
        before = 0
        for first in range(0, self.documents, CHUNK):
            bounds = np.array(self.bounds[first + 1 : first + 1 + CHUNK])
            if bounds.min() < 0 or bounds.max() > self.header.sequences:
                raise ConfigError(f"{self.prefix}.idx is damaged: its documents name sequences out of range")
            ends = np.full(len(bounds), self.data_size, dtype=np.int64)
            is_inside = bounds < self.header.sequences
            ends[is_inside] = self.pointers[bounds[is_inside]]
            ends //= self.header.width
            if (np.diff(ends, prepend=before) < 0).any():
                raise ConfigError(f"{self.prefix}.idx is damaged: a document ends before its begin")
            before = int(ends[-1])
            yield ends

    def place_of(self, token: int) -> str:
        """Return in words where a token stands; the tables must be whole."""
        sequence = bisect_right(self.pointers, token * self.header.width) - 1
        document = bisect_right(self.bounds, sequence) - 1
        offset = token - int(self.pointers[sequence]) // self.header.width
        return f"document {document} (sequence {sequence}, token {offset})"

    def _table(self, dtype: str, offset: int, count: int) -> Any:
        return np.memmap(Path(f"{self.prefix}.idx"), np.dtype(dtype), "r", offset=offset, shape=(count,))


def open_tables(prefix: str) -> IndexTables:
    """Return the tables of a pair.

    Raises:
        ConfigError: a file is missing, or .idx is no index, cut off or without any sequence.
    """
    header = read_header(prefix)
    if header.sequences == 0 or header.bounds < 2:
        raise ConfigError(f"{prefix} holds no tokens: the data set is empty")
    return IndexTables(prefix, header, Path(f"{prefix}.bin").stat().st_size)
