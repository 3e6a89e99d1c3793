"""The worker side of `testing.distributed`: take a case from the pipe, be one rank of it, send back what came out."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_let.lifetime import die_with_parent

# (action, pattern of the message, category, pattern of the module, line number): the arguments of filterwarnings
WarningFilter = tuple[Any, str, Any, str, int]


_MAX_THREADS = 60
"""Of a worker between two cases, before it looks for garbage that keeps threads alive."""


@dataclass(frozen=True)
class Case:
    """One rank's part of a case, as it travels through the pipe."""

    call: bytes  # pickled (function, arguments, function to run after it or None)
    rank: int
    world_size: int
    port: int
    store_file: str | None  # where the ranks meet; None: the function makes its own process group
    import_path: tuple[str, ...]
    directory: str
    warning_filters: tuple[WarningFilter, ...]
    timeout: float  # seconds


@dataclass(frozen=True)
class Outcome:
    """What came of one rank: its value, or the text of what went wrong and when it did."""

    value: Any = None
    failure: str | None = None
    # Seconds of the clock that all programs of a machine share. A rank that fails closes its connections, and the
    # peers that notice may well be heard of first.
    failed_at: float = 0.0


def serve(pipe: Connection, parent_pid: int, stack_file: str) -> None:
    """Take part in cases until the pipe closes; each answer is a pickled `Outcome`."""
    die_with_parent(parent_pid)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole terminal group; the parent decides
    import torch

    torch.set_num_threads(1)
    with Path(stack_file).open("w") as stacks:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=stacks)
        with suppress(EOFError):  # the pipe closed: the pool has ended
            while True:
                _take_part(pipe, pickle.loads(pipe.recv_bytes()))


def _take_part(pipe: Connection, case: Case) -> None:
    """Be one rank of a case: send back what came of it, and leave its process group when all ranks are done."""
    with _surroundings(case):
        outcome = _outcome_of(case)
        try:
            # Plain pickle: torch's own pickling for pipes shares memory by descriptor, which dies with the worker.
            answer = pickle.dumps(outcome)
        except Exception:
            outcome = _failure()
            answer = pickle.dumps(outcome)
        pipe.send_bytes(answer)
        if outcome.failure is None:
            pipe.recv_bytes()  # a rank that is done early must not close what a peer still reads
        _leave()


def _outcome_of(case: Case) -> Outcome:
    """Make the process group, call the function, then the clean-up, and return what came of it."""
    import torch

    try:
        function, args, after_each = pickle.loads(case.call)
        if case.store_file is not None:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{case.store_file}",
                rank=case.rank,
                world_size=case.world_size,
                timeout=timedelta(seconds=case.timeout),
            )
        outcome = Outcome(function(*args))
        if after_each is not None:
            after_each()
    except BaseException:
        return _failure()
    return outcome


def _failure() -> Outcome:
    """Return the outcome for the exception being handled."""
    return Outcome(failure=traceback.format_exc(), failed_at=time.monotonic())


def _leave() -> None:
    """Take down the process group, and torch's settings that a case may have changed."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        _end_threads_of_groups()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def _end_threads_of_groups() -> None:
    """Free groups that only garbage still holds: each has three threads, and hundreds of them slow every case down.

    megatron-core's cached rotary embeddings hold one too.
    """
    rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
    if rotary is not None:
        rotary.RotaryEmbedding.forward.cache_clear()
    if _num_threads() > _MAX_THREADS:
        gc.collect()


def _num_threads() -> int:
    """Return the threads of this process, those of libraries included (Linux; elsewhere as many as make us act)."""
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else _MAX_THREADS + 1


@contextmanager
def _surroundings(case: Case) -> Iterator[None]:
    """Give the case the parent's import path, directory and warning filters and torchrun's variables, for its time."""
    environment, import_path, directory = dict(os.environ), list(sys.path), os.getcwd()
    sys.path[:] = case.import_path
    os.chdir(case.directory)
    os.environ.update(
        RANK=str(case.rank),
        LOCAL_RANK=str(case.rank),
        WORLD_SIZE=str(case.world_size),
        LOCAL_WORLD_SIZE=str(case.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(case.port),
    )
    try:
        with warnings.catch_warnings():
            _set_warning_filters(case.warning_filters)
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = import_path
        os.chdir(directory)


def _set_warning_filters(filters: tuple[WarningFilter, ...]) -> None:
    """Treat warnings as the parent does: under pytest, as errors with named exceptions."""
    warnings.resetwarnings()
    for rule in filters:
        warnings.filterwarnings(*rule, append=True)
