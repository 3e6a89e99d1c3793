"""The line that names the rank which holds the others up, with real ranks that stop, sleep and are late."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_let.mcore import parallel
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train
from megatron_let.training import forward_step
from megatron_let.training.watchdog import Heartbeat, Position, StalledError, _place, stall_line
from tests.processes import HANG_SECONDS
from tests.training.bad_input import logged_lines

WORDS = {"--mock-data": None, "--train-iters": 4, "--watchdog-seconds": 1}


def at(iteration: int, phase: str, **changes: Any) -> Position:
    """Return a position of stage 0 that its rank has been in for 58 seconds."""
    values = {"beat": 1, "stage": 0, "seconds": 58.0, "is_reading": False, "is_waiting": True}
    return Position(iteration=iteration, phase=phase, place="f (g.py:1)", **{**values, **changes})


def test_the_rank_that_is_behind_is_named_by_iteration_phase_and_what_it_does() -> None:
    waits = at(7, "forward-backward")
    late = {
        "iteration": at(6, "save"),
        "reads data": at(7, "forward-backward", is_reading=True, is_waiting=False),
        "computes": at(7, "forward-backward", is_waiting=False),
    }
    for position in late.values():
        line = stall_line({0: waits, 1: waits, 2: position}, {}, 60.0)
        assert line == (
            f"no iteration has finished for 60 s: rank 2 (stage 0) is {position.text()} for 58 s, in f (g.py:1); the "
            'others wait at "forward-backward" of iteration 7, in f (g.py:1)'
        )
    assert 'data (forward-backward)" of iteration 7' in late["reads data"].text()
    ahead = at(7, "optimizer", is_waiting=False)
    assert ": rank 0 (stage 0) is" in stall_line({0: waits, 1: ahead}, {}, 60.0)


def test_a_silent_rank_is_named_before_all_others_and_ranks_alike_are_not_told_apart() -> None:
    positions: dict[int, Position | None] = {0: at(7, "forward-backward"), 1: at(7, "optimizer", stage=3)}
    assert stall_line(positions, {1: 55.0}, 60.0).startswith(
        "no iteration has finished for 60 s: rank 1 (stage 3) has not been heard from for 55 s, last at "
        '"optimizer" of iteration 7; the others wait at "forward-backward"'
    )
    alike: dict[int, Position | None] = {rank: at(7, "save") for rank in range(20)}
    assert 'all 20 ranks are at "save" of iteration 7 for 58 s' in stall_line(alike, {}, 60.0)
    alike[20] = at(8, "save")
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more are" in stall_line(alike, {}, 60.0)


def test_before_the_first_iteration_the_start_is_what_does_not_get_on() -> None:
    starting = at(0, "start", stage=None)
    late = at(0, "start", stage=None, is_waiting=False)
    assert stall_line({0: starting, 1: late}, {}, 60.0) == (
        "no iteration has begun for 60 s: rank 1 is at the start for 58 s, in f (g.py:1); the others wait at the start, "
        "in f (g.py:1)"
    )
    assert "rank 1 has not been heard from for 55 s, last at the start" in stall_line(
        {0: starting, 1: late}, {1: 55.0}, 60.0
    )
    absent = "no iteration has begun for 60 s: rank 1 did not come to where the ranks meet"
    assert stall_line({0: starting, 1: None}, {}, 60.0) == absent


def test_a_rank_that_waits_in_a_collective_is_told_from_one_that_works() -> None:
    import sys

    place, is_waiting = _place(sys._getframe())
    assert place.startswith("test_a_rank_that_waits_in_a_collective")
    assert not is_waiting

    frames: list[Any] = []

    class Group:
        def size(self) -> int:
            frames.append(sys._getframe(1))
            return 1

    dist.distributed_c10d.get_world_size(Group())  # type: ignore[arg-type]
    assert _place(frames[0])[1]


@contextmanager
def at_microbatch(rank: int, number: int, action: Any) -> Iterator[None]:
    """Do something on this rank before its n-th microbatch is taken from the iterator."""
    taken = [0]
    build = forward_step.build_microbatch

    def and_act(*words: Any, **settings: Any) -> Any:
        taken[0] += 1
        if taken[0] == number and dist.get_rank() == rank:
            action()
        return build(*words, **settings)

    with patch.object(forward_step, "build_microbatch", and_act):
        yield


def warnings_of_training(lines: list[str]) -> list[str]:
    """Return the warnings from the first about an iteration on: a slow machine's start takes longer than the limit too."""
    warnings = [line for line in lines if line.startswith("WARNING")]
    first = next((n for n, line in enumerate(warnings) if "has finished" in line), len(warnings))
    return warnings[first:]


def no_slow_iterations() -> Any:
    """Let the limit be that of the flag, however slow the machine's iterations are."""
    return patch.object(Heartbeat, "usual_seconds", lambda heartbeat: 0.0)


def train_with_a_sleeping_loader() -> list[str]:
    """Train while rank 1 waits for its data for a while; return the lines."""
    reading = Heartbeat.reading
    reads = [0]

    @contextmanager
    def late(self: Heartbeat) -> Iterator[None]:
        with reading(self):
            reads[0] += 1
            if reads[0] >= 10 and dist.get_rank() == 1:  # then slow enough that "the ranks go on" is seen
                time.sleep(5 if reads[0] == 10 else 0.1)
            yield

    with patch.object(Heartbeat, "reading", late), no_slow_iterations(), logged_lines() as lines:
        train(arguments(TINY_STUDENT, WORDS))
    return lines


def test_a_rank_that_waits_for_its_data_is_named(pool: RankPool) -> None:
    lines, of_rank_1 = pool.run(2, train_with_a_sleeping_loader)
    warnings = warnings_of_training(lines)
    # On a crowded machine others are late as well, for moments.
    named = [line for line in warnings if '"data (forward-backward)" of iteration 3 for' in line]
    assert 1 <= len(named) <= 3
    assert "rank 1 (stage 0) is at" in named[0]
    assert 'the others wait at "' in named[0]
    assert warnings[-1] == "WARNING the ranks go on"
    assert [line for line in of_rank_1 if line in named] == []


class WakeUp(threading.Thread):
    """Wakes a stopped process up after so many seconds: the stopped rank cannot, and the test must end."""

    def __init__(self, pid_file: Path, seconds: float) -> None:
        super().__init__(daemon=True)
        self._pid_file, self._seconds = pid_file, seconds

    def run(self) -> None:
        """Wait for the id, then for the time, then wake it."""
        while not self._pid_file.exists() or not self._pid_file.read_text():
            time.sleep(0.05)
        time.sleep(self._seconds)
        os.kill(int(self._pid_file.read_text()), signal.SIGCONT)


def train_with_a_stopped_rank(directory: Path, stopped: int, seconds: float, limit: float) -> list[str]:
    """Train while one rank is stopped for some seconds, a minute of the time limit being `limit` seconds long.

    Returns the lines, an error among them.
    """
    pid_file = directory / "pid"

    def stop() -> None:
        pid_file.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    if int(os.environ["RANK"]) != stopped:
        WakeUp(pid_file, seconds).start()
    with (
        patch.object(parallel, "timedelta", lambda *, minutes: timedelta(seconds=minutes * limit)),
        patch.object(parallel_state, "timedelta", lambda *, minutes: timedelta(seconds=minutes * limit)),
        at_microbatch(stopped, 10, stop),
        no_slow_iterations(),
        logged_lines() as lines,
    ):
        try:
            train(arguments(TINY_STUDENT, {**WORDS, "--distributed-timeout-minutes": 1}))
        except StalledError as error:
            lines.append(f"ERROR {error}")
        except RuntimeError as error:
            lines.append(f"LOST {error}")
    return lines


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_and_when_it_goes_on_so_does_the_run(
    stopped: int, pool: RankPool, tmp_path: Path
) -> None:
    outcomes = pool.run(
        2,
        train_with_a_stopped_rank,
        tmp_path,
        stopped,
        4.0,
        60.0,
        init_process_group=False,
        timeout=HANG_SECONDS,
    )
    if stopped == 1:  # rank 0 keeps the store here: while it stands still nobody can be asked
        silent = [line for line in warnings_of_training(outcomes[0]) if "not been heard from" in line]
        assert "rank 1 (stage 0) has not been heard from for" in silent[0]
        # What it last published may be older than where it stopped.
        assert re.search(
            'of iteration [0-3]; the others wait at "forward-backward" of iteration 3', silent[-1]
        )
    assert any("iteration        4/" in line for line in outcomes[0])


def meet(directory: Path, where: str) -> list[str]:
    """Start a run of which rank 1 stands still before it meets the others, or loads for too long; return the lines."""
    from megatron_let.training import build

    make = build.build_student

    def stand_still(*words: Any, **settings: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(16)
        return make(*words, **settings)

    words = arguments(TINY_STUDENT, {**WORDS, "--distributed-timeout-minutes": 1})
    with (
        patch.object(parallel, "timedelta", lambda *, minutes: timedelta(seconds=minutes * 8)),
        patch.object(parallel_state, "timedelta", lambda *, minutes: timedelta(seconds=minutes * 8)),
        logged_lines() as lines,
    ):
        if where == "meeting" and os.environ["RANK"] == "1":
            time.sleep(16)
            return lines
        patched = patch.object(build, "build_student", stand_still) if where == "build" else nullcontext()
        with patched:
            try:
                train(words)
            except (StalledError, RuntimeError) as error:
                lines.append(f"{type(error).__name__} {error}")
    return lines


def imported() -> None:
    """Load what a run needs, which on a crowded machine takes longer than its time limit here."""
    from megatron_let.training import build

    assert build


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("meeting", "no iteration has begun for .* rank 1 did not come to where the ranks meet"),
        ("build", r"no iteration has begun for .* rank 1 \(stage 0\) is at the start for .* in stand_still "),
    ],
)
def test_a_rank_that_stands_still_at_the_start_is_named(
    where: str, named: str, pool: RankPool, tmp_path: Path
) -> None:
    pool.run(2, imported)
    lines = pool.run(2, meet, tmp_path, where, init_process_group=False)[0]
    assert re.search(f"WARNING {named}", "\n".join(lines))
    assert re.search(f"StalledError the ranks' time limit .* has struck; {named}", lines[-1])
    pool.close()  # the group was left in pieces


def test_when_the_time_limit_strikes_the_last_words_name_the_stopped_rank(
    pool: RankPool, tmp_path: Path
) -> None:
    outcomes = pool.run(
        2, train_with_a_stopped_rank, tmp_path, 1, 8.0, 5.0, init_process_group=False, timeout=HANG_SECONDS
    )
    assert outcomes[0][-1].startswith(
        "ERROR the ranks' time limit (--distributed-timeout-minutes) has struck; no iteration has finished for "
    )
    assert "rank 1 (stage 0) has not been heard from for" in outcomes[0][-1]
    pool.close()  # the group was left in pieces
