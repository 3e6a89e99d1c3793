"""When a run leaves before its end: a signal, a time limit or an interval, acted on between two iterations."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_let.config.training import TrainingConfig
from megatron_let.mcore.parallel import ParallelContext


class StopRequest:
    """Set by a signal, read by the trainer between iterations.

    `started` is the program's start on `time.monotonic`'s clock, from which `--exit-duration-in-mins` counts.
    """

    def __init__(self, started: float | None = None) -> None:
        self.signal_name: str | None = None
        self._started = time.monotonic() if started is None else started

    def receive(self, number: int, _: FrameType | None) -> None:
        """Take a signal: the first is remembered, a second one ends the process at once by its default action."""
        self.signal_name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    def reason(self, training: TrainingConfig, context: ParallelContext, iteration: int) -> str | None:
        """Return why the run should save and leave after this iteration, None to go on; every rank calls this.

        All ranks agree, whichever of them has the reason.
        """
        if training.exit_signal_handler and context.any_rank(self.signal_name is not None):
            return f"received {self.signal_name or 'a signal'}"
        if training.exit_duration_in_mins is not None:
            minutes = (time.monotonic() - self._started) / 60.0
            if context.any_rank(minutes > training.exit_duration_in_mins):
                return f"{minutes:.1f} minutes have passed (--exit-duration-in-mins)"
        if training.exit_interval and iteration % training.exit_interval == 0:
            return "--exit-interval"
        return None


@contextmanager
def stop_on_signal(*, is_on: bool, started: float | None = None) -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGUSR1 inside the context when `is_on` (`--exit-signal-handler`)."""
    request = StopRequest(started)
    if not is_on:
        yield request
        return
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
