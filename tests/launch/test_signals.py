"""What the launcher makes of signals that come more than once; the times are made up."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Literal

import pytest

from megatron_let.launch import signals
from megatron_let.signal_pipe import REPEAT_SECONDS


def noting(sent: list[int]) -> Callable[[int], Literal[True]]:
    """Return a sender to workers that are all there: it notes what they would get."""

    def send(number: int) -> Literal[True]:
        sent.append(number)
        return True

    return send


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.0], [signal.SIGINT]),
        ([0.0, 0.1, REPEAT_SECONDS - 0.1], [signal.SIGINT]),
        ([0.0, REPEAT_SECONDS], [signal.SIGINT, signal.SIGKILL]),
        ([0.0, 0.6 * REPEAT_SECONDS, 1.2 * REPEAT_SECONDS], [signal.SIGINT, signal.SIGKILL]),
    ],
)
def test_ctrl_c_again_in_a_moment_is_the_first_and_later_kills(
    times: list[float], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(signals, "_send", noting(sent))
    forwarder = signals._Forwarder(grace=1000.0)
    for now in times:
        forwarder.hear(signal.SIGINT, now)
    forwarder.close()
    assert sent == expected


def test_other_signals_are_all_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(signals, "_send", noting(sent))
    forwarder = signals._Forwarder(grace=1000.0)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        forwarder.hear(number, 0.0)
    forwarder.close()
    assert sent == [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]
