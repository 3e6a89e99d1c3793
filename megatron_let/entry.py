"""What surrounds a program's `main`: exit codes, the one line about a failure, and the record of how it ended.

    if __name__ == "__main__":
        end_program(run_main(main))

Under `python -m megatron_let.launch` a failing rank prints nothing: it leaves a record, and the launcher shows
the first failure alone. Under bare torchrun or srun, or with no launcher, the rank prints it as its last words.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn

from megatron_let.directory_lock import LOCK_WAIT_SECONDS, DirectoryLock, lock_directory, lock_file_of
from megatron_let.errors import (
    EXIT_BAD_CONFIGURATION,
    EXIT_CRASH,
    EXIT_DONE,
    ConfigError,
    LetError,
    ProblemsError,
)
from megatron_let.exit_status import (
    EXIT_STATUS_FILE,
    FailureRecord,
    announce_save_directory,
    clear_exit_status,
    has_exit_status_since,
    leave_record,
    reason_of,
    write_exit_status,
)
from megatron_let.lifetime import ELASTIC_RUN_VARIABLE, die_with_launcher, take_children_along
from megatron_let.limits import exceeded_limit, take_open_files
from megatron_let.signal_pipe import take_signals_back
from megatron_let.slurm import SLURM_TASKS_VARIABLE, adopt_slurm_ranks

# Under bare torchrun (and srun --kill-on-bad-exit) all ranks meet the same configuration error within moments. Rank 0
# speaks at once and its end makes torchrun stop the others in a tenth of a second; these wait longer before they speak.
_TURN_SECONDS = 1.0
_STATUS_SECONDS = 10.0
_TURN_STEP_SECONDS = 0.25


@dataclass
class RunReport:
    """What a run says about itself while it goes, so that its end can be recorded."""

    save_directory: str | None = None
    iteration: int | None = None
    reason: str | None = None  # why it ended, when it ended by itself; default: the name of its exit code
    message: str = ""
    started: float = field(default_factory=time.monotonic)
    """When the program did, on `time.monotonic`'s clock."""
    began: float = field(default_factory=time.time, init=False)
    """The same, in seconds since the epoch."""
    _wanted: str | None = field(default=None, init=False, repr=False)
    _lock: DirectoryLock | None = field(default=None, init=False, repr=False)
    _lock_file: int | None = field(default=None, init=False, repr=False)
    _failed: BaseException | None = field(default=None, init=False, repr=False)
    _is_left: bool = field(default=False, init=False, repr=False)

    def saves_to(self, directory: str | os.PathLike[str] | None) -> None:
        """Note where `exit_status.json` belongs (None: nowhere); rank 0 drops the one of an earlier run.

        While another run holds the directory, this one writes nothing there.
        """
        self._wanted = None if directory is None else os.fspath(directory)
        if self._wanted is None or _rank() != 0:
            return
        with suppress(ConfigError):  # `hold` waits for it, and says what is wrong
            self._take(self._wanted, wait=0.0)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Have a failure told as it comes out of the block, before the process groups around the block are torn down.

        To the peers that is a failure too, and they may be the quicker ones to tell of it.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self.record(error)
            raise

    def record(self, error: BaseException) -> bool:
        """Record a failure, once, in `exit_status.json` and for the launcher; return whether there is one to read it."""
        if self._failed is error:
            return self._is_left
        self._failed = error
        failure = _failure_of(error)
        directory = self.status_directory()
        # A crash is often the echo of a peer's failure: it never writes over what a peer of this run wrote.
        if directory is not None and (
            failure.traceback is None or not has_exit_status_since(directory, self.began)
        ):
            write_exit_status(directory, failure.code, reason_of(failure.code), failure.line, self.iteration)
        self._is_left = self._leave(failure)
        return self._is_left

    def _leave(self, failure: _Failure) -> bool:
        """Leave the record of this rank's end for the launcher; return whether there is one to read it."""
        return leave_record(
            FailureRecord(
                exit_code=failure.code,
                message=failure.line,
                traceback=failure.traceback,
                time=time.time(),
                rank=_rank(),
                pids=(os.getpid(), os.getppid()),
                save_directory=self.save_directory or self._wanted,
                iteration=self.iteration,
            )
        )

    def hold(self) -> str | None:
        """Make the save directory and hold it until this program ends (rank 0); return it, None without one.

        A directory that cannot be made or written to is left to the check that says so.

        Raises:
            ConfigError: another run holds it, and went on doing so for `LOCK_WAIT_SECONDS`.
        """
        if self._wanted is not None and self._lock is None:
            with suppress(OSError):
                os.makedirs(self._wanted, exist_ok=True)
            self._take(self._wanted, wait=LOCK_WAIT_SECONDS)
        return self._wanted

    def is_held(self, directory: str | None) -> None:
        """Note on every rank that rank 0 holds this directory: how the run ends may be written there."""
        self.save_directory = directory
        if directory is not None:
            self._lock_file = _lock_file(directory)
            announce_save_directory(directory)

    def status_directory(self) -> str | None:
        """Return where `exit_status.json` belongs; None without a save directory, or when it is no more this run's."""
        directory = self.save_directory
        return directory if directory is not None and _lock_file(directory) == self._lock_file else None

    def _take(self, directory: str, *, wait: float) -> None:
        self.save_directory = None
        self._lock = lock_directory(directory, wait=wait)
        self.save_directory = directory
        self._lock_file = _lock_file(directory)
        if self._lock is not None:
            announce_save_directory(directory)
            clear_exit_status(directory)

    def end_at_once(self, code: int, line: str) -> NoReturn:
        """End this program from any of its threads, whatever the others do: record, last words of rank 0, gone."""
        is_told = self._leave(_Failure(code, line, None))
        if _rank() == 0 and not is_told:
            directory = self.status_directory()
            if directory is not None:
                write_exit_status(directory, code, reason_of(code), line, self.iteration)
            _print(line)
        os._exit(code)


def run_main(main: Callable[[RunReport], int]) -> int:
    """Call `main(report)` and return this program's exit code, having told once what went wrong.

    A task of srun becomes a rank first, as torchrun would have told it.
    A `LetError` becomes one line `error: ...`, a limit of the machine too, with code 2; anything else keeps its traceback
    and code 1; Ctrl-C is 130.
    SIGTERM keeps its default action (or what `main` makes of it), so that a hung collective cannot delay it.
    """
    take_signals_back()
    die_with_launcher()
    take_children_along()
    report = RunReport()
    try:
        take_open_files()
        adopt_slurm_ranks(os.environ)
        code = main(report)
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure_of(error)
        if not report.record(error):
            _speak(failure.traceback or failure.line, failure.code)
        return failure.code
    directory = report.status_directory()
    if _rank() == 0 and directory is not None:
        reason = report.reason or reason_of(code)
        if not write_exit_status(directory, code, reason, report.message, report.iteration):
            _print(f"warning: {EXIT_STATUS_FILE} cannot be written to {directory}")
    if code != EXIT_DONE and report.save_directory is not None:
        _await_exit_status(report.save_directory, report.began)
    return code


def _await_exit_status(directory: str, started: float) -> None:
    """Wait for rank 0's record of a planned early end: the first rank to leave makes the launcher stop the others."""
    deadline = time.monotonic() + _STATUS_SECONDS
    while not has_exit_status_since(directory, started) and time.monotonic() < deadline:
        time.sleep(0.05)


def end_program(code: int) -> NoReturn:
    """End this program with `code`, at once when it failed.

    After a failure the usual end of an interpreter may wait for threads and peers that will never answer, while
    the other ranks wait for this one: its children are killed, its output is written out, and it is gone.
    """
    if code == EXIT_DONE and _flush():
        sys.exit(code)
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    _flush()
    os._exit(code)


@dataclass(frozen=True)
class _Failure:
    """What a program leaves with for an exception."""

    code: int
    line: str
    traceback: str | None
    """None where the line says it all."""


def _failure_of(error: BaseException) -> _Failure:
    """Return the code and the words for an exception that has come up to here."""
    if isinstance(error, LetError):
        return _Failure(error.exit_code, f"error: {_one_line(error)}", None)
    if isinstance(error, KeyboardInterrupt):
        return _Failure(128 + signal.SIGINT, "error: interrupted", None)
    if limit := exceeded_limit(error):
        return _Failure(EXIT_BAD_CONFIGURATION, f"error: {limit}", None)
    line = f"error: {type(error).__name__}: {_one_line(error)}"
    return _Failure(EXIT_CRASH, line, "".join(traceback.format_exception(error)))


def _speak(text: str, code: int) -> None:
    """Print a rank's last words on stderr, in turn when torchrun or srun may be about to stop it for a peer's.

    srun ends with the largest code of its tasks: one that is stopped leaves with its own, not with the signal's.
    """
    if (ELASTIC_RUN_VARIABLE in os.environ or SLURM_TASKS_VARIABLE in os.environ) and _rank() != 0:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
        time.sleep(_TURN_SECONDS + _TURN_STEP_SECONDS * int(os.environ.get("LOCAL_RANK", "0")))
    _flush()
    _print(text.rstrip("\n"))


def _print(text: str) -> None:
    """Print on standard error; where that cannot be written, the exit code must do."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _flush() -> bool:
    """Write out both streams; a closed one is nobody's loss. Return whether that worked: Python's own end fails else."""
    works = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            works = False
    return works


def _one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).replace(ProblemsError.SEPARATOR, " | ").split())


def _lock_file(directory: str) -> int | None:
    """Return which file is a directory's lock, None also where that cannot be seen now."""
    with suppress(OSError):
        return lock_file_of(directory)
    return None


def _rank() -> int:
    """Return this program's global rank, 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))
