"""Which failure is named when several workers fail within moments of each other."""

from __future__ import annotations

import signal
from dataclasses import replace

from megatron_let.exit_status import FailureRecord
from megatron_let.launch.failures import Failure, first_failure


def failure(
    rank: int,
    exit_code: int,
    *,
    said: str | None = None,
    trace: str | None = None,
    time: float = 10.0,
    was_stopped: bool = False,
) -> Failure:
    """Build a failure; `said` gives it a record."""
    record = None
    if said is not None:
        record = FailureRecord(exit_code, said, trace, time, rank, (1, 2), None, None)
    return Failure(rank, exit_code, pid=1, time=float(int(time)), was_stopped=was_stopped, record=record)


def test_the_earlier_of_two_exceptions_is_first_whatever_the_rank() -> None:
    echo = failure(0, 1, said="error: Connection closed by peer", trace="...", time=10.02)
    cause = failure(1, 1, said="error: boom", trace="...", time=10.01)
    assert first_failure([echo, cause]) is cause


def test_a_configuration_error_outranks_the_crash_that_it_brings_about() -> None:
    echo = failure(0, 1, said="error: Connection closed by peer", trace="...", time=10.0)
    cause = failure(1, 2, said="error: no such teacher", time=10.3)
    assert first_failure([echo, cause]) is cause
    assert cause.text() == "error: no such teacher"


def test_a_killed_worker_outranks_its_peers_exceptions_but_not_when_the_launcher_stopped_it() -> None:
    echo = failure(0, 1, said="error: Connection closed by peer", trace="...", time=10.0)
    assert first_failure([echo, failure(1, -signal.SIGKILL, time=11.0)]).rank == 1
    assert first_failure([echo, failure(1, -signal.SIGKILL, time=41.0, was_stopped=True)]).rank == 0
    assert first_failure([echo, failure(1, -signal.SIGTERM, was_stopped=True)]).rank == 0


def test_a_worker_that_was_stopped_after_it_had_said_why_it_fails_counts_as_it_said() -> None:
    echo = failure(0, 1, said="error: Connection closed by peer", trace="...", time=10.02)
    said = failure(1, 1, said="error: boom", trace="...", time=10.01)
    cause = replace(said, exit_code=-signal.SIGTERM, was_stopped=True)
    assert first_failure([echo, cause]) is cause
    assert cause.shell_code() == 1


def test_a_watchdogs_abort_is_an_echo() -> None:
    cause = failure(1, 1, said="error: boom", trace="...", time=12.0)
    assert first_failure([failure(0, -signal.SIGABRT, time=11.0), cause]) is cause


def test_a_signals_usual_cause_is_said() -> None:
    assert failure(2, -signal.SIGBUS).text() == (
        "error: rank 2 (pid 1) was ended by SIGBUS (often: a file was cut while it was read, or /dev/shm is full)"
    )


def test_codes_are_counted_as_a_shell_does() -> None:
    assert failure(0, -signal.SIGSEGV).shell_code() == 128 + signal.SIGSEGV
    assert failure(0, 7).shell_code() == 7
    assert failure(0, 2).text() == ""  # a documented code without record: the worker has said why itself
