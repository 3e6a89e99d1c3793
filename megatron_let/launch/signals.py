"""Signals to the launcher are its workers' business: pass them on, and end what does not end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from megatron_let.signal_pipe import REPEAT_SECONDS, heard_signals, is_meant_to_be_ignored


@contextmanager
def forwarded_signals(names: Sequence[str], *, grace: float) -> Iterator[None]:
    """Pass these signals on to the workers for the duration of a block.

    With no worker there, the launcher ends with 128 + n. `grace`: seconds from the first signal until the workers that
    are still there are killed. Under `nohup` SIGHUP stays ignored, here and by the workers.
    """
    forwarder = _Forwarder(grace)
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    try:
        with heard_signals(
            [number for number in numbers if not is_meant_to_be_ignored(number)], forwarder.hear
        ):
            yield
    finally:
        forwarder.close()


class _Forwarder:
    """What is remembered between two signals."""

    def __init__(self, grace: float) -> None:
        self._timer = threading.Timer(grace, _send, (signal.SIGKILL,))
        self._timer.daemon = True
        self._is_timed = False
        self._interrupted: float | None = None

    def hear(self, number: int, now: float) -> None:
        """Act on a signal. A second Ctrl-C means now; one within `REPEAT_SECONDS` of the first is that, heard twice."""
        sent = number
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted < REPEAT_SECONDS:
                return
            else:
                sent = signal.SIGKILL
        if not _send(sent):
            os._exit(128 + number)
        if not self._is_timed:
            self._is_timed = True
            self._timer.start()

    def close(self) -> None:
        """Call off the killing."""
        self._timer.cancel()


def _send(number: int) -> bool:
    """Send a signal to each worker; return False when there is none.

    A worker alone gets what it may want to act on (its loader and writer programs must live for its last save);
    SIGKILL goes to its whole group.
    """
    import psutil

    workers = psutil.Process().children()
    for worker in workers:
        with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if number == signal.SIGKILL and os.getpgid(worker.pid) == worker.pid:
                os.killpg(worker.pid, number)
            else:
                worker.send_signal(number)
    return bool(workers)
