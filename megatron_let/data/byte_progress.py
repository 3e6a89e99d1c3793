"""Progress through bytes whose number is known: a line every few seconds, none for small files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_let.data.progress import format_seconds


@dataclass
class ByteProgress:
    """Counts bytes and says so now and then."""

    total: int
    write: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    interval: float = 10.0
    """Seconds between two lines."""
    done: int = 0
    _started: float = field(init=False)
    _last_line: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self._last_line = self.clock()

    def add(self, count: int) -> None:
        """Count bytes that were read."""
        self.done += count
        now = self.clock()
        if now - self._last_line < self.interval:
            return
        self._last_line = now
        seconds = now - self._started
        left = seconds * (self.total - self.done) / self.done if self.done else 0.0
        self.write(
            f"read {100 * self.done / self.total:.1f} % of {self.total / 1e6:,.1f} MB | "
            f"{self.done / 1e6 / seconds:.1f} MB/s | elapsed {format_seconds(seconds)}, ETA {format_seconds(left)}"
        )
