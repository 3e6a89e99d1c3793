"""Are the tables of PREFIX.idx what a reader needs? Every entry is looked at, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_let.data.byte_progress import ByteProgress
from megatron_let.data.index_tables import CHUNK, IndexTables, open_tables
from megatron_let.data.indexed import BOUND_BYTES, LENGTH_BYTES, POINTER_BYTES
from megatron_let.errors import ConfigError


@dataclass(frozen=True)
class Check:
    """One thing that was checked; `problem` says what is wrong and where it was met first."""

    name: str
    problem: str | None = None
    note: str = ""

    def line(self) -> str:
        """Return the outcome in one line."""
        if self.problem is not None:
            return f"{self.name}: FAILED: {self.problem}"
        return f"{self.name}: ok, {self.note}" if self.note else f"{self.name}: ok"


def require_tables(prefix: str, write_line: Callable[[str], None]) -> None:
    """Look at every entry of PREFIX.idx; `write_line` receives progress on large files.

    megatron-core takes the tables on trust: a length below 0 has its loops never end, or read outside their arrays.

    Raises:
        ConfigError: the pair is damaged.
    """
    tables = open_tables(prefix)
    for check in check_tables(tables, ByteProgress(tables.header.index_size, write_line)):
        if check.problem is not None:
            raise ConfigError(f"{prefix}.idx is damaged: {check.problem}; preprocess the data again")


def check_tables(tables: IndexTables, progress: ByteProgress) -> list[Check]:
    """Return the checks of lengths, pointers and documents, in this order."""
    return [*_check_sequences(tables, progress), _check_documents(tables, progress)]


def _check_sequences(tables: IndexTables, progress: ByteProgress) -> list[Check]:
    """Check that no length is below 0 and that each sequence begins where the one before it ends.

    Every known writer leaves no gap; a reader goes by the pointers, a counter of tokens by the file's size.
    """
    negative: str | None = None
    misplaced: str | None = None
    empty, first_empty, position = 0, -1, 0
    for first in range(0, tables.header.sequences, CHUNK):
        lengths = tables.lengths[first : first + CHUNK].astype(np.int64)
        pointers = np.array(tables.pointers[first : first + CHUNK])
        if negative is None and (found := _first(lengths < 0)) is not None:
            negative = f"sequence {first + found} has {lengths[found]} tokens"
        if first_empty < 0 and (found := _first(lengths == 0)) is not None:
            first_empty = first + found
        empty += int((lengths == 0).sum())
        ends = position + np.cumsum(lengths) * tables.header.width
        starts = np.concatenate([[position], ends[:-1]])
        if misplaced is None and (found := _first(pointers != starts)) is not None:
            misplaced = _misplaced(first + found, int(pointers[found]), int(starts[found]))
        position = int(ends[-1])
        progress.add(len(lengths) * (LENGTH_BYTES + POINTER_BYTES))
    note = f"{tables.header.sequences:,} sequences"
    if empty:
        note += f", {empty:,} of them without tokens (first: sequence {first_empty})"
    return [
        Check("lengths", negative, note),
        Check("pointers", misplaced, "each sequence begins where the one before it ends"),
    ]


def _misplaced(sequence: int, pointer: int, expected: int) -> str:
    how = f"{pointer - expected} bytes after" if pointer > expected else f"{expected - pointer} bytes before"
    return (
        f"sequence {sequence} begins at byte {pointer}, {how} the end of the one before it (byte {expected})"
    )


def _check_documents(tables: IndexTables, progress: ByteProgress) -> Check:
    """Check that documents go from sequence 0 to the last and none begins before the one in front of it."""
    sequences = tables.header.sequences
    empty = 0
    if int(tables.bounds[0]) != 0:
        return Check("documents", f"document 0 begins at sequence {int(tables.bounds[0])}, not at 0")
    for first in range(0, tables.documents, CHUNK):
        bounds = np.array(tables.bounds[first : first + CHUNK + 1])
        steps = np.diff(bounds)
        if (found := _first(steps < 0)) is not None:
            begin, end = bounds[found], bounds[found + 1]
            return Check(
                "documents", f"document {first + found} begins at sequence {begin} and ends at {end}"
            )
        empty += int((steps == 0).sum())
        progress.add(len(steps) * BOUND_BYTES)
    if int(tables.bounds[-1]) != sequences:
        return Check(
            "documents", f"the last document ends at sequence {tables.bounds[-1]}, not at {sequences}"
        )
    note = f"{tables.documents:,} documents" + (f", {empty:,} of them empty" if empty else "")
    return Check("documents", note=note)


def _first(is_wrong: Any) -> int | None:
    """Return the first position where a condition [n] holds."""
    found = int(np.argmax(is_wrong))
    return found if is_wrong[found] else None
