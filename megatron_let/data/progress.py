"""Progress as plain lines with rate and time left: the same in a terminal and in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class ProgressMeter:
    """Counts work done and says so, whenever another `log_interval` documents are through."""

    total_bytes: int | None
    """Size on disk of everything to read, None when it is not known."""
    log_interval: int
    """Documents between two lines."""
    write: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    min_seconds: float = 1.0
    """Least time between two lines."""
    read_before: int = 0
    """Bytes on disk that an earlier, stopped run has read."""
    documents_before: int = 0
    """Documents that it is through with."""
    documents: int = 0
    """Of this run alone, as all that follow but `read_bytes`."""
    tokens: int = 0
    content_bytes: int = 0
    read_bytes: int = 0
    _started: float = field(init=False)
    _last_line: float = field(init=False)
    _last_documents: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._started = self._last_line = self.clock()

    def add(self, *, documents: int, tokens: int, content_bytes: int, read_bytes: int) -> None:
        """Count work done: records, tokens, bytes of text, and how far the input is read on disk in all."""
        self.documents += documents
        self.tokens += tokens
        self.content_bytes += content_bytes
        self.read_bytes = read_bytes
        now = self.clock()
        is_due = self.documents // self.log_interval > self._last_documents // self.log_interval
        if is_due and now - self._last_line >= self.min_seconds:
            self._last_line, self._last_documents = now, self.documents
            self.write(self.line())

    def line(self) -> str:
        """Return the state in one line."""
        seconds = max(self.clock() - self._started, 1e-9)
        return (
            f"processed {self.documents_before + self.documents:,} records, {self._share()} | "
            f"{self.content_bytes / 1e6 / seconds:.2f} MB/s, {self.documents / seconds:,.0f} records/s, "
            f"{self.tokens / seconds:,.0f} tokens/s | elapsed {format_seconds(seconds)}, ETA {self._time_left(seconds)}"
        )

    def _share(self) -> str:
        if not self.total_bytes:
            return f"{self.read_bytes / 1e6:,.1f} MB"
        return f"{100 * self.read_bytes / self.total_bytes:.1f} % of {self.total_bytes / 1e6:,.1f} MB"

    def _time_left(self, seconds: float) -> str:
        read_now = self.read_bytes - self.read_before
        left = 0 if self.total_bytes is None else self.total_bytes - self.read_bytes
        if self.total_bytes is None or (left and not read_now):
            return "unknown"
        return format_seconds(seconds * left / max(read_now, 1))


def format_seconds(seconds: float) -> str:
    """Return H:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
