"""The line that names the rank which holds the others up, with real ranks that stop, sleep and are late."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.training.bad_input import logged_lines

LIMIT = 90.0
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
    assert "rank 5 did not get to the training loop" in stall_line({**alike, 5: None}, {}, 60.0)


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

    with patch.object(Heartbeat, "reading", late), logged_lines() as lines:
        train(arguments(TINY_STUDENT, WORDS))
    return lines


def test_a_rank_that_waits_for_its_data_is_named(pool: RankPool) -> None:
    lines, of_rank_1 = pool.run(2, train_with_a_sleeping_loader, timeout=LIMIT)
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert 'rank 1 (stage 0) is at "data (forward-backward)" of iteration 3 for' in warnings[0]
    assert 'the others wait at "' in warnings[0]
    assert warnings[-1] == "WARNING the ranks go on"
    assert len(warnings) <= 4
    assert [line for line in of_rank_1 if line.startswith("WARNING")] == []


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
        2, train_with_a_stopped_rank, tmp_path, stopped, 4.0, 60.0, init_process_group=False, timeout=LIMIT
    )
    if stopped == 1:  # rank 0 keeps the store here: while it stands still nobody can be asked
        warnings = [line for line in outcomes[0] if line.startswith("WARNING")]
        assert "rank 1 (stage 0) has not been heard from for" in warnings[0]
        # What it last published may be older than where it stopped.
        assert re.search(
            'of iteration [0-3]; the others wait at "forward-backward" of iteration 3', warnings[0]
        )
    assert any("iteration        4/" in line for line in outcomes[0])


def test_when_the_time_limit_strikes_the_last_words_name_the_stopped_rank(
    pool: RankPool, tmp_path: Path
) -> None:
    outcomes = pool.run(
        2, train_with_a_stopped_rank, tmp_path, 1, 8.0, 5.0, init_process_group=False, timeout=LIMIT
    )
    assert outcomes[0][-1].startswith(
        "ERROR the ranks' time limit (--distributed-timeout-minutes) has struck; no iteration has finished for "
    )
    assert "rank 1 (stage 0) has not been heard from for" in outcomes[0][-1]
    pool.close()  # the group was left in pieces
