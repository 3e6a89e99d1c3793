"""A log that cannot be written does not stop a run: its rows wait until it can be, a warning says so."""

from __future__ import annotations

from collections import deque

from megatron_let.log import LOGGER
from megatron_let.training.metrics import Row, Sink

MOST_WAITING_ROWS = 100_000
"""About 100 MB of memory; more rows than a run logs while a person makes room on a disk."""


class PatientSink:
    """Hands rows to another sink; while that cannot write, it keeps them and tries again with each new one."""

    def __init__(self, name: str, sink: Sink, *, most_waiting: int = MOST_WAITING_ROWS) -> None:
        """Wrap `sink`, called `name` in messages; rows beyond `most_waiting` are lost, and counted."""
        self._name = name
        self._sink = sink
        self._most_waiting = most_waiting
        self._waiting: deque[Row] = deque()
        self._num_lost = 0
        self._is_failing = False

    def write(self, row: Row) -> None:
        """Take one row."""
        self._waiting.append(row)
        self.flush()
        if len(self._waiting) > self._most_waiting:
            self._waiting.pop()
            self._num_lost += 1

    def flush(self) -> None:
        """Write what waits, if that is possible now."""
        try:
            while self._waiting:
                self._sink.write(self._waiting[0])
                self._waiting.popleft()
        except OSError as problem:
            if not self._is_failing:
                LOGGER.warning(
                    f"{self._name} cannot be written ({problem.strerror or problem}); the run goes on, and the rows wait "
                    "until it can be"
                )
            self._is_failing = True
            return
        if self._is_failing:
            LOGGER.info(f"{self._name} is written again{self._lost()}")
        self._is_failing, self._num_lost = False, 0

    def close(self) -> None:
        """Write what waits, or say that it is lost, and let go."""
        self.flush()
        if self._is_failing:
            self._num_lost += len(self._waiting)
        try:
            self._sink.close()
        except OSError as problem:
            LOGGER.warning(
                f"{self._name} cannot be closed ({problem.strerror or problem}): its end may be missing"
            )
        if self._is_failing:
            LOGGER.warning(f"{self._name} could not be written to the end{self._lost()}")

    def _lost(self) -> str:
        return f"; {self._num_lost} rows are lost" if self._num_lost else ""
