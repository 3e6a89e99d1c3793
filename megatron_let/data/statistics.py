"""How long documents are: exact order statistics and a histogram of a data set of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_let.data.index_tables import IndexTables

# Lengths below are counted one by one (8 MiB). Longer documents are kept: a million tokens each, they are few.
_COUNTED_LENGTHS = 1 << 20
_BAR_WIDTH = 40


@dataclass(frozen=True)
class LengthStatistics:
    """Tokens a document. A percentile is the least length that so many documents do not exceed."""

    documents: int
    empty: int
    minimum: int
    median: int
    p90: int
    p99: int
    maximum: int
    histogram: tuple[tuple[int, int, int], ...]
    """Least length, greatest length, documents: by powers of two, from the first that occurs to the last."""

    def lines(self) -> list[str]:
        """Return the numbers and the histogram, for people."""
        numbers = (
            f"tokens a document: min {self.minimum:,}, median {self.median:,}, p90 {self.p90:,}, p99 {self.p99:,}, "
            f"max {self.maximum:,}; {self.empty:,} documents are empty"
        )
        highest = max(count for _, _, count in self.histogram)
        names = [f"{low:,}-{high:,}" if low < high else f"{low:,}" for low, high, _ in self.histogram]
        width = max(map(len, names))
        rows = []
        for name, (_, _, count) in zip(names, self.histogram, strict=True):
            bar = "#" * -(-count * _BAR_WIDTH // highest)
            rows.append(
                f"  {name:>{width}} |{bar:<{_BAR_WIDTH}} {count:,} ({100 * count / self.documents:.1f} %)"
            )
        return [numbers, *rows]


def length_statistics(tables: IndexTables) -> LengthStatistics:
    """Count the tokens of every document.

    Raises:
        ConfigError: the tables are damaged.
    """
    counts = np.zeros(_COUNTED_LENGTHS, dtype=np.int64)
    long: list[Any] = []
    before = 0
    for ends in tables.document_ends():
        lengths = np.diff(ends, prepend=before)
        before = int(ends[-1])
        counts += np.bincount(lengths[lengths < _COUNTED_LENGTHS], minlength=_COUNTED_LENGTHS)
        long.append(lengths[lengths >= _COUNTED_LENGTHS])
    return _statistics(counts, np.sort(np.concatenate(long)))


def _statistics(counts: Any, long: Any) -> LengthStatistics:
    """Return the statistics of `counts` [length] documents below the limit and of the sorted lengths above it."""
    below = np.cumsum(counts)
    num_counted = int(below[-1])
    documents = num_counted + len(long)

    def at(rank: int) -> int:
        if rank < num_counted:
            return int(np.searchsorted(below, rank, side="right"))
        return int(long[rank - num_counted])

    def share(percent: int) -> int:
        return at(-(-documents * percent // 100) - 1)

    minimum, maximum = at(0), at(documents - 1)
    return LengthStatistics(
        documents=documents,
        empty=int(counts[0]),
        minimum=minimum,
        median=share(50),
        p90=share(90),
        p99=share(99),
        maximum=maximum,
        histogram=tuple(
            _row(counts, long, power) for power in range(minimum.bit_length(), maximum.bit_length() + 1)
        ),
    )


def _row(counts: Any, long: Any, power: int) -> tuple[int, int, int]:
    """Return the histogram's row of the lengths that need `power` binary digits."""
    low, high = (1 << power) // 2, (1 << power) - 1
    counted = int(counts[low : high + 1].sum())
    return low, high, counted + int(((long >= low) & (long <= high)).sum())
