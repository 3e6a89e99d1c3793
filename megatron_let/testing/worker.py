"""The worker side of `testing.distributed`: take a case from the pipe, be one rank of it, send back what came out."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_let.lifetime import die_with_parent

# (action, pattern of the message, category, pattern of the module, line number): the arguments of filterwarnings
WarningFilter = tuple[Any, str, Any, str, int]


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


class _FailedError(Exception):
    """Carries an exception's traceback and time past the taking down of the process group."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome = Outcome(failure=traceback.format_exc(), failed_at=time.monotonic())


def serve(pipe: Connection, parent_pid: int, stack_file: str) -> None:
    """Run cases until the pipe closes; each answer is a pickled `Outcome`."""
    die_with_parent(parent_pid)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole terminal group; the parent decides
    import torch

    torch.set_num_threads(1)
    with Path(stack_file).open("w") as stacks:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=stacks)
        while True:
            try:
                case: Case = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            pipe.send_bytes(_answer(case))


def _answer(case: Case) -> bytes:
    """Run one case and return what goes back through the pipe; nothing it raises ends the worker."""
    try:
        with _surroundings(case):
            # Plain pickle: torch's own pickling for pipes shares memory by descriptor, which dies with the worker.
            return pickle.dumps(Outcome(_call(case)))
    except _FailedError as error:
        return pickle.dumps(error.outcome)
    except BaseException:
        return pickle.dumps(_FailedError().outcome)


def _call(case: Case) -> Any:
    """Be one rank: make the process group, call the function, take the group down."""
    import torch

    function, args, after_each = pickle.loads(case.call)
    if case.store_file is not None:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{case.store_file}",
            rank=case.rank,
            world_size=case.world_size,
            timeout=timedelta(seconds=case.timeout),
        )
    try:
        return _then(function, args, after_each)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def _then(function: Callable[..., Any], args: tuple[Any, ...], after_each: Callable[[], None] | None) -> Any:
    """Call the function, then the clean-up, whatever the function did."""
    try:
        return function(*args)
    except BaseException:
        raise _FailedError from None
    finally:
        if after_each is not None:
            after_each()


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
