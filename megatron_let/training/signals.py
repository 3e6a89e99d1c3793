"""Remember that the run was asked to stop, until the end of the iteration."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Set by a signal, read by the trainer between iterations."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Take a signal: the first is remembered, a second one ends the process at once by its default action."""
        self.signal_name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def stop_on_signal(*, is_on: bool) -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGUSR1 inside the context when `is_on` (`--exit-signal-handler`)."""
    request = StopRequest()
    if not is_on:
        yield request
        return
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
