"""When a run leaves before its end: a signal, a time limit or an interval, acted on between two iterations."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_let.config.training import TrainingConfig
from megatron_let.entry import RunReport
from megatron_let.lifetime import die_with_parent, has_bare_torchrun
from megatron_let.log import LOGGER
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.signal_pipe import REPEAT_SECONDS, heard_signals

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_ORPHAN_SECONDS = 30.0
"""How long a rank that saves may outlive its torchrun: as long as torchrun would have waited for it."""


class StopRequest:
    """Set by a signal, read by the trainer between iterations.

    `started` is the program's start on `time.monotonic`'s clock, from which `--exit-duration-in-mins` counts.
    `end_at_once(code, line)` ends the program when a signal comes a second time.
    `launcher`: the id of the parent whose end is told by SIGTERM.
    """

    def __init__(
        self,
        started: float | None = None,
        end_at_once: Callable[[int, str], object] | None = None,
        launcher: int | None = None,
    ) -> None:
        self.signal_name: str | None = None
        self._launcher = launcher
        self._started = time.monotonic() if started is None else started
        self._end_at_once = end_at_once
        self._received: dict[int, float] = {}

    def receive(self, number: int, now: float) -> None:
        """Take a signal at `now` seconds: the first is remembered, the same one again ends the program at once.

        Again is `REPEAT_SECONDS` later; what comes sooner is the first one, delivered twice.
        """
        name = signal.Signals(number).name
        if self._launcher not in (None, os.getppid()):
            self._outlive_launcher()
        first = self._received.setdefault(number, now)
        if self.signal_name is None:
            self.signal_name = name
            LOGGER.info(
                f" received {name}: saving and leaving after this iteration (again after {REPEAT_SECONDS:.0f} s: at once)"
            )
        elif now - first >= REPEAT_SECONDS and self._end_at_once is not None:
            waited = f"{name} came again after {now - first:.0f} s"
            self._end_at_once(128 + number, f"error: {waited}: ended at once, nothing more is saved")

    def _outlive_launcher(self) -> None:
        """Have this rank, whose launcher is gone, end within `_ORPHAN_SECONDS`, whatever it waits for."""
        self._launcher = None
        line = (
            f"error: torchrun was ended and the ranks were not done with saving {_ORPHAN_SECONDS:.0f} s later"
        )
        assert self._end_at_once is not None, "a run that knows its launcher knows how to end"
        deadline = threading.Timer(_ORPHAN_SECONDS, self._end_at_once, (128 + signal.SIGTERM, line))
        deadline.daemon = True
        deadline.start()

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
def stop_on_signal(training: TrainingConfig, report: RunReport) -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGUSR1 inside the context when `--exit-signal-handler` asks for it.

    torchrun does not pass SIGUSR1 on, it ends by it: the kernel's word of that is a request to save and leave too.
    """
    if not training.exit_signal_handler:
        yield StopRequest(report.started, report.end_at_once)
        return
    launcher = os.getppid() if has_bare_torchrun() else None
    request = StopRequest(report.started, report.end_at_once, launcher)
    with heard_signals(_SIGNALS, request.receive):
        if launcher is not None:
            die_with_parent(launcher, by=signal.SIGTERM)
        yield request
