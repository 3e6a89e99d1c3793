"""Run a function on N gloo ranks, with the worker programs reused from case to case.

Starting an interpreter and importing torch costs seconds, a case milliseconds, so the workers of a `RankPool`
are started once, when first needed, and each case makes and destroys its own process group:

    with RankPool(max_world_size=4) as pool:
        losses = pool.run(2, train_a_few_steps, settings)  # one result a rank

The function and its arguments travel by pickle: the function must be importable by name. Inside it `RANK`,
`LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are set as under torchrun, and the gloo process group
is there. After any failure the whole pool is killed and the next case starts a fresh one.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection as mp_connection
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from unittest.mock import patch

from megatron_let.testing.worker import Case, Outcome, WarningFilter, serve

Result = TypeVar("Result")

DEFAULT_TIMEOUT = 600.0
"""Seconds: on a crowded machine the workers alone take a minute to start."""
# Once a rank has failed, its peers get this long to report their own end: enough for a "connection closed" to
# arrive, short beside a hang.
FAILURE_GRACE = 2.0
ALL_DONE = b"all done"
NEVER = float("inf")
_SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class RankError(AssertionError):
    """A case failed on at least one rank; the message holds the traceback of each rank that failed."""


class RankTimeoutError(RankError):
    """A case did not end in time; the message holds where each rank stood."""


@dataclass(frozen=True)
class _Worker:
    """One started worker: its program, our end of the pipe, and the file it dumps its stacks to."""

    program: BaseProcess
    pipe: mp_connection.Connection
    stack_file: Path


class RankPool:
    """Up to `max_world_size` worker programs that run cases as the ranks of a gloo process group."""

    def __init__(
        self,
        max_world_size: int = 4,
        *,
        environment: Mapping[str, str] | None = None,
        after_each: Callable[[], None] | None = None,
    ) -> None:
        """Make an empty pool; workers start when a case needs them.

        `environment` is added to that of the workers; `after_each` runs on every rank after each case that went
        well, with the process group still there, to take down what it left (model-parallel state).
        """
        self.max_world_size = max_world_size
        self._environment = {**_SINGLE_THREAD, **(environment or {})}
        self._after_each = after_each
        self._workers: list[_Worker] = []
        self._directory = tempfile.mkdtemp(prefix="rank_pool_")
        # Runs before multiprocessing's own exit hook, which would wait for the workers for ever.
        self._finalizer = weakref.finalize(self, _dispose, self._workers, self._directory)

    def __enter__(self) -> RankPool:
        """Return the pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all workers and remove what the pool keeps on disk."""
        self._finalizer()

    def run(
        self,
        world_size: int,
        function: Callable[..., Result],
        *args: Any,
        timeout: float = DEFAULT_TIMEOUT,
        init_process_group: bool = True,
    ) -> list[Result]:
        """Call `function(*args)` on each of `world_size` ranks and return the results in rank order.

        With `init_process_group=False` the function finds only the environment and makes its own process group.
        Raises `RankError` when a rank raises or dies, `RankTimeoutError` after `timeout` seconds; either way no
        rank is left hanging.
        """
        if not 1 <= world_size <= self.max_world_size:
            raise ValueError(
                f"world_size {world_size} is outside 1..{self.max_world_size}, the size of this pool"
            )
        self._start(world_size)
        workers = self._workers[:world_size]
        call = pickle.dumps((function, args, self._after_each))
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            store_file = str(Path(directory, "store")) if init_process_group else None
            port = _free_port()
            for rank, worker in enumerate(workers):
                case = Case(
                    call=call,
                    rank=rank,
                    world_size=world_size,
                    port=port,
                    store_file=store_file,
                    import_path=tuple(sys.path),
                    directory=os.getcwd(),
                    warning_filters=_warning_filters(),
                    timeout=timeout,
                )
                with suppress(BrokenPipeError):  # the worker died at its start: its outcome says so
                    worker.pipe.send_bytes(pickle.dumps(case))
            outcomes = _collect(workers, timeout)
        if any(outcome.failure is not None for outcome in outcomes):
            self.close()
            raise _error_of(outcomes, timeout)
        for worker in workers:
            worker.pipe.send_bytes(ALL_DONE)
        return [outcome.value for outcome in outcomes]

    def pids(self) -> list[int]:
        """Return the ids of the workers that run now, in rank order."""
        return [worker.program.pid for worker in self._workers if worker.program.pid is not None]

    def close(self) -> None:
        """End all workers; a later case starts new ones."""
        _kill(self._workers)

    def _start(self, count: int) -> None:
        """Have `count` workers running; start from nothing when one of the present ones has ended."""
        if any(not worker.program.is_alive() for worker in self._workers):
            self.close()
        context = get_context("spawn")
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            stack_file = Path(self._directory, f"stacks_{len(self._workers)}.txt")
            # Not a daemon in multiprocessing's sense: those may not start writers of checkpoints or of data.
            program = context.Process(target=serve, args=(theirs, os.getpid(), str(stack_file)), daemon=False)
            with patch.dict(os.environ, self._environment):  # OpenMP reads its setting when torch is imported
                program.start()
            theirs.close()
            self._workers.append(_Worker(program, ours, stack_file))


def _collect(workers: Sequence[_Worker], timeout: float) -> list[Outcome]:
    """Wait for every rank's outcome, a short while only once one has failed; return them in rank order."""
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(workers):
        pending = {rank: worker for rank, worker in enumerate(workers) if rank not in outcomes}
        handles = [handle for worker in pending.values() for handle in (worker.pipe, worker.program.sentinel)]
        ready = mp_connection.wait(handles, max(0.0, deadline - time.monotonic()))
        if not ready:
            outcomes.update({rank: _stuck(worker) for rank, worker in pending.items()})
        for rank, worker in pending.items():
            if worker.pipe in ready or worker.program.sentinel in ready:
                outcomes[rank] = _receive(worker)
                if outcomes[rank].failure is not None:
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE)
    return [outcomes[rank] for rank in range(len(workers))]


def _receive(worker: _Worker) -> Outcome:
    """Read one rank's outcome; a worker that died without one has failed."""
    try:
        outcome: Outcome = pickle.loads(worker.pipe.recv_bytes())
    except (EOFError, OSError):
        worker.program.join(1.0)
        died = f"the worker died with exit code {worker.program.exitcode}"
        return Outcome(failure=died)  # first of all: no exception of a peer ends a worker like this
    return outcome


def _stuck(worker: _Worker) -> Outcome:
    """Ask a worker that does not answer for its stacks, and say where it stands."""
    where = ""
    if worker.program.pid is not None and hasattr(signal, "SIGUSR1"):
        os.kill(worker.program.pid, signal.SIGUSR1)
        time.sleep(0.2)
        where = worker.stack_file.read_text() if worker.stack_file.exists() else ""
    return Outcome(failure=f"did not end; it stood at\n{where}", failed_at=NEVER)


def _error_of(outcomes: Sequence[Outcome], timeout: float) -> RankError:
    """Build the exception that tells what went wrong on which rank, the first failure first."""
    failures = [
        (outcome.failed_at, rank) for rank, outcome in enumerate(outcomes) if outcome.failure is not None
    ]
    message = "\n".join(
        f"--- rank {rank} of {len(outcomes)}\n{outcomes[rank].failure}" for _, rank in sorted(failures)
    )
    if all(failed_at == NEVER for failed_at, _ in failures):
        return RankTimeoutError(f"not done after {timeout:g} s\n{message}")
    return RankError(f"failed, first failure first\n{message}")


def _dispose(workers: list[_Worker], directory: str) -> None:
    """End these workers and remove their directory."""
    _kill(workers)
    shutil.rmtree(directory, ignore_errors=True)


def _kill(workers: list[_Worker]) -> None:
    """End these workers at once and forget them."""
    for worker in workers:
        worker.pipe.close()
        worker.program.kill()
    for worker in workers:
        worker.program.join()
    workers.clear()


def _warning_filters() -> tuple[WarningFilter, ...]:
    """Return the filters of this program, foremost first, as the arguments that make them again."""
    rules: list[WarningFilter] = []
    for action, message, category, module, line in warnings.filters:
        # The interpreter's own filters hold text, those made later hold compiled patterns.
        texts = [str(getattr(pattern, "pattern", pattern) or "") for pattern in (message, module)]
        rules.append((action, texts[0], category, texts[1], line))
    return tuple(rules)


def _free_port() -> int:
    """Return a TCP port of this machine that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
