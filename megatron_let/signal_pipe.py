"""Signals heard by a thread, so that a main thread that waits (in a collective, in a rendezvous) cannot delay them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_SECONDS = 5.0
"""A signal that comes again sooner is one signal, delivered twice: by a scheduler and by the launcher, to a group and to
each of its programs. Later it is a second one, by somebody who does not want to wait."""

_RELIED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
_MEANT_TO_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)


def take_signals_back() -> None:
    """Undo what the program that started this one made of the signals that a run relies on.

    Ignored signals and the mask of blocked ones are inherited: SIGTERM and SIGUSR1 would never arrive, and without SIGCHLD
    the exit code of a worker is lost. Main thread only.
    """
    for number in _RELIED_ON:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_RELIED_ON, *_MEANT_TO_BE_IGNORED})


def is_meant_to_be_ignored(number: int) -> bool:
    """Return whether the starter of this program shields it: `nohup` from SIGHUP, a script's background from SIGINT."""
    return number in _MEANT_TO_BE_IGNORED and signal.getsignal(number) == signal.SIG_IGN


@contextmanager
def heard_signals(numbers: Collection[int], hear: Callable[[int, float], None]) -> Iterator[None]:
    """Call `hear(number, seconds of the monotonic clock)` in a thread for each of these signals inside the context.

    The system writes a signal's number to a pipe that the thread reads. Their former actions are put back at the end.
    """
    if not numbers:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _do_nothing) for number in numbers}
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, frozenset(numbers), hear), daemon=True)
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


def _listen(reader: int, numbers: frozenset[int], hear: Callable[[int, float], None]) -> None:
    """Hand on each signal until the pipe closes."""
    while data := os.read(reader, 1):
        if data[0] in numbers:
            hear(data[0], time.monotonic())
