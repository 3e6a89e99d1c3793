"""Signals are remembered until the end of the iteration, and only where that was asked for."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_let.training.signals import stop_on_signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_and_the_second_is_left_to_its_default(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signal(is_on=True) as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), number)
        assert stop.signal_name == signal.Signals(number).name
        assert signal.getsignal(number) is signal.SIG_DFL
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_handlers_are_put_back_after_an_error() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(ZeroDivisionError), stop_on_signal(is_on=True):
        raise ZeroDivisionError
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_without_the_flag_signals_are_left_alone() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signal(is_on=False) as stop:
        assert [signal.getsignal(each) for each in SIGNALS] == before
    assert stop.signal_name is None
