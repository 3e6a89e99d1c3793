"""Competitors in their own processes that take turns: what `tools/benchmark.py` measures with.

Each side is one process a rank, built once and then asked to run a few steps at a time while the others wait on
their pipes. So A B A B within one call see the same machine, and no side carries the other's libraries or patches.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_let.lifetime import die_with_parent

_ANSWER, _FAILURE = "answer", "failure"


class StepTime(NamedTuple):
    """Seconds of one step."""

    wall: float
    processor: float
    """Of all threads of the rank; on a shared machine steadier than the wall time, on a GPU without meaning."""


class SideError(RuntimeError):
    """A rank of a side failed; the message holds its traceback."""


@dataclass(frozen=True)
class Placement:
    """One rank of a side: where it stands and on which cores it runs."""

    rank: int
    world_size: int
    port: int
    num_threads: int
    cores: tuple[int, ...] | None


class Side:
    """The ranks of one competitor; `ask` calls a method of what `build(settings)` yields, on every rank.

    `build` is the name of a context manager, as in `module:function`: only the ranks import it.
    """

    def __init__(self, name: str, build: str, settings: Any, *, world_size: int, num_threads: int) -> None:
        self.name = name
        self._ranks: list[tuple[Any, connection.Connection]] = []
        context, port = get_context("spawn"), free_port()
        for rank in range(world_size):
            placement = Placement(
                rank, world_size, port, num_threads, cores_of(rank, world_size, num_threads)
            )
            ours, theirs = context.Pipe()
            program = context.Process(target=_serve, args=(theirs, os.getpid(), build, settings, placement))
            with patch.dict(os.environ, OMP_NUM_THREADS=str(num_threads), PYTHONWARNINGS="ignore"):
                program.start()
            theirs.close()
            self._ranks.append((program, ours))
        self._answers()

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Return the answer of every rank, in rank order."""
        for _, pipe in self._ranks:
            pipe.send((method, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        """Wait for all ranks; raise SideError as soon as one has failed."""
        answers: dict[int, Any] = {}
        while len(answers) < len(self._ranks):
            waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks) if rank not in answers}
            for pipe in connection.wait(list(waiting)):
                assert isinstance(pipe, connection.Connection), "only pipes are waited for"
                try:
                    kind, answers[waiting[pipe]] = pipe.recv()
                except EOFError:
                    raise SideError(f"rank {waiting[pipe]} of {self.name} died") from None
                if kind == _FAILURE:
                    raise SideError(f"rank {waiting[pipe]} of {self.name} failed\n{answers[waiting[pipe]]}")
        return [answers[rank] for rank in range(len(self._ranks))]

    def close(self) -> None:
        """End the ranks: each leaves by itself when its pipe closes, or is killed after a while."""
        for _, pipe in self._ranks:
            pipe.close()
        for program, _ in self._ranks:
            program.join(10.0)
            program.kill()
            program.join()


@contextmanager
def open_side(
    name: str, build: str, settings: Any, *, world_size: int = 1, num_threads: int = 1
) -> Iterator[Side]:
    """Start a side, and end it on leaving.

    Raises:
        SideError: a rank failed while it was built.
    """
    side = Side(name, build, settings, world_size=world_size, num_threads=num_threads)
    try:
        yield side
    finally:
        side.close()


def time_steps(step: Callable[[], None], count: int) -> list[StepTime]:
    """Call `step` `count` times; return what each took, the device's work included."""
    times = []
    for _ in range(count):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(StepTime(time.perf_counter() - wall, time.process_time() - processor))
    return times


def take_turns(sides: Sequence[Side], *, repeats: int, steps: int) -> dict[str, list[list[StepTime]]]:
    """Return the times of each side's steps, [repeats][steps], from A B ... A B ...

    The wall time of a step is that of its slowest rank, the processor time the sum over its ranks.
    """
    times: dict[str, list[list[StepTime]]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            per_rank = side.ask("steps", steps)
            times[side.name].append([_together(of_step) for of_step in zip(*per_rank, strict=True)])
    return times


def _together(of_ranks: Sequence[StepTime]) -> StepTime:
    return StepTime(max(step.wall for step in of_ranks), sum(step.processor for step in of_ranks))


def cores_of(rank: int, world_size: int, num_threads: int) -> tuple[int, ...] | None:
    """Return the cores that rank `rank` of every side is bound to; None where there are not enough or no binding."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    available = sorted(os.sched_getaffinity(0))
    if world_size * num_threads > len(available):
        return None
    return tuple(available[rank * num_threads : (rank + 1) * num_threads])


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on right now.

    Below the ports that systems hand out by themselves: seconds pass before the rank listens on it.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _serve(
    pipe: connection.Connection, parent_pid: int, build: str, settings: Any, placement: Placement
) -> None:
    """Be one rank: build, then answer questions until the pipe closes."""
    die_with_parent(parent_pid)
    _settle(placement)
    try:
        module, _, function = build.partition(":")
        with getattr(import_module(module), function)(settings) as run:
            pipe.send((_ANSWER, None))
            while True:
                try:
                    method, arguments = pipe.recv()
                except EOFError:
                    return
                pipe.send((_ANSWER, getattr(run, method)(*arguments)))
    except Exception:
        pipe.send((_FAILURE, traceback.format_exc()))


def _settle(placement: Placement) -> None:
    """Take this rank's place: torchrun's variables, cores and threads; what libraries remark on start is left out."""
    logging.disable(logging.WARNING)
    os.environ.update(
        RANK=str(placement.rank),
        LOCAL_RANK=str(placement.rank),
        WORLD_SIZE=str(placement.world_size),
        LOCAL_WORLD_SIZE=str(placement.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(placement.port),
    )
    if placement.cores is not None and not torch.cuda.is_available():
        os.sched_setaffinity(0, placement.cores)
        torch.set_num_threads(placement.num_threads)
