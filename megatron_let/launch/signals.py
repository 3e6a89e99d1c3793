"""Signals to the launcher are its workers' business: pass them on, and end what does not end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def forwarded_signals(names: Sequence[str], *, grace: float) -> Iterator[None]:
    """Pass these signals on to the workers for the duration of a block.

    The system writes each signal's number to a pipe that a thread reads, so that a main thread that waits in a
    rendezvous cannot delay it. With no worker there, the launcher ends with 128 + n. `grace`: seconds from the
    first signal until the workers that are still there are killed.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, _do_nothing) for number in numbers}
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_forward, args=(reader, frozenset(numbers), grace), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, action in before.items():
            signal.signal(number, action)
        os.close(writer)
        thread.join()
        os.close(reader)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Stand as the handler of a signal whose number the system writes to the pipe."""


def _forward(reader: int, numbers: frozenset[int], grace: float) -> None:
    """Read signal numbers until the pipe closes and act on each."""
    timer: threading.Timer | None = None
    was_interrupted = False
    while data := os.read(reader, 1):
        number = data[0]
        if number not in numbers:
            continue
        is_impatient = number == signal.SIGINT and was_interrupted
        was_interrupted = was_interrupted or number == signal.SIGINT
        if not _send(signal.SIGKILL if is_impatient else number):
            os._exit(128 + number)
        if timer is None:
            timer = threading.Timer(grace, _send, (signal.SIGKILL,))
            timer.daemon = True
            timer.start()
    if timer is not None:
        timer.cancel()


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
