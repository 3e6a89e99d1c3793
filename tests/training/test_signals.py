"""Signals are remembered until the end of the iteration, and only where that was asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_let.config.training import TrainingConfig
from megatron_let.entry import RunReport
from megatron_let.signal_pipe import REPEAT_SECONDS, heard_signals
from megatron_let.testing.distributed import RankPool
from megatron_let.training.signals import StopRequest, stop_on_signal
from tests.processes import HANG_SECONDS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CAUGHT = TrainingConfig(exit_signal_handler=True)


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until the thread that hears signals has done something, or fail."""
    deadline = time.monotonic() + HANG_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signal(CAUGHT, RunReport()) as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # delivered twice: this program is still there
        wait_for(lambda: stop.signal_name == signal.Signals(number).name)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def ends_of(*received: tuple[int, float]) -> list[tuple[int, str]]:
    """Return the ends at once that these signals (number, time) bring about."""
    ends: list[tuple[int, str]] = []
    stop = StopRequest(0.0, lambda code, line: ends.append((code, line)))
    for number, now in received:
        stop.receive(number, now)
    return ends


@pytest.mark.parametrize("number", SIGNALS)
def test_the_same_signal_again_ends_the_program_unless_it_is_one_delivered_twice(number: int) -> None:
    assert ends_of((number, 7.0), (number, 7.1), (number, 7.0 + REPEAT_SECONDS - 0.1)) == []
    ((code, line),) = ends_of((number, 7.0), (number, 7.1), (number, 7.0 + REPEAT_SECONDS + 0.1))
    assert code == 128 + number
    assert line == (
        f"error: {signal.Signals(number).name} came again after 5 s: ended at once, nothing more is saved"
    )


def test_a_rank_whose_launcher_is_gone_ends_in_time_even_when_it_cannot_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_let.training.signals._ORPHAN_SECONDS", 0.05)
    ends: list[tuple[int, str]] = []
    there = StopRequest(0.0, lambda code, line: ends.append((code, line)), os.getppid())
    gone = StopRequest(0.0, lambda code, line: ends.append((code, line)), os.getpid())
    there.receive(signal.SIGTERM, 0.0)
    gone.receive(signal.SIGTERM, 0.0)
    wait_for(lambda: bool(ends))
    time.sleep(0.2)
    assert [code for code, _ in ends] == [143]
    assert "torchrun was ended and the ranks were not done with saving" in ends[0][1]


def test_a_schedulers_warning_and_its_limit_are_two_signals_of_which_neither_is_a_second() -> None:
    assert ends_of((signal.SIGUSR1, 0.0), (signal.SIGTERM, 120.0)) == []
    assert len(ends_of((signal.SIGUSR1, 0.0), (signal.SIGTERM, 120.0), (signal.SIGTERM, 130.0))) == 1


def test_a_signal_is_heard_while_the_main_thread_runs_no_python() -> None:
    heard: list[float] = []
    numbers = torch.rand(20_000_000)
    with heard_signals(SIGNALS, lambda number, now: heard.append(now)):
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -TERM {os.getpid()}"])
        deadline = time.monotonic() + HANG_SECONDS
        calls: list[tuple[float, float]] = []
        while killer.poll() is None and time.monotonic() < deadline:
            begun = time.monotonic()
            torch.sort(numbers)  # one call, seconds long
            calls.append((begun, time.monotonic()))
        wait_for(lambda: bool(heard))
    assert any(begun < heard[0] < ended for begun, ended in calls)


def test_actions_are_put_back_after_an_error() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(ZeroDivisionError), stop_on_signal(CAUGHT, RunReport()):
        raise ZeroDivisionError
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_without_the_flag_signals_are_left_alone() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signal(TrainingConfig(), RunReport()) as stop:
        assert [signal.getsignal(each) for each in SIGNALS] == before
    assert stop.signal_name is None


def train_until_rank_1_is_signalled() -> tuple[int, int]:
    """Train until a signal comes to rank 1 in iteration 3; return the exit code and the iterations done."""
    from unittest.mock import patch

    from megatron_let.testing.training import TINY_STUDENT, arguments, train
    from megatron_let.training.trainer import Trainer

    iterate, done = Trainer._iterate, [0]
    report = RunReport()

    def and_signal(self: Trainer, iterators: list[Any]) -> None:
        if done[0] == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: stop.signal_name is not None)
        iterate(self, iterators)
        done[0] += 1

    words = arguments(TINY_STUDENT, {"--mock-data": None, "--exit-signal-handler": None})
    with patch.object(Trainer, "_iterate", and_signal), stop_on_signal(CAUGHT, report) as stop:
        return train(words, stop=stop), done[0]


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_iteration(pool: RankPool) -> None:
    assert pool.run(2, train_until_rank_1_is_signalled) == [(3, 3), (3, 3)]
