"""Run the quickstart's steps as child programs: one line of progress with the time left, and a clear end.

Used by tools/quickstart.py. What a child prints goes to a log file; a training child's progress is read from the
`metrics.jsonl` that it writes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from megatron_let.errors import LetError
from megatron_let.lifetime import die_with_parent
from megatron_let.regular_files import read_text

_POLL_SECONDS = 0.5
# How often a line is printed where lines cannot be written over (a file, a pipe).
_QUIET_SECONDS = 10.0
_LAST_LINES = 15
# Before the command that a log begins with.
_COMMAND = "$ "


class ChildFailed(LetError):
    """A step's program ended with another code than 0; this one ends with the same."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Status:
    """How far a step is: words for the progress line, and what is left of it in seconds where that is known."""

    text: str
    seconds_left: float | None = None


@dataclass(frozen=True)
class PlannedStep:
    """A step as the progress line needs it; `expected_seconds` is for the first estimate only."""

    number: int
    title: str
    expected_seconds: float


class ProgressLine:
    """The one line that tells how far the whole is. Estimates of later steps follow the pace of those done."""

    def __init__(self, plan: Sequence[PlannedStep], num_steps: int, stream: TextIO) -> None:
        self._plan = list(plan)
        self._num_steps = num_steps
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._started = time.monotonic()
        self._step_started = self._started
        self._expected_of_done = 0.0
        self._last_shown = 0.0
        self._width = 0

    @property
    def step(self) -> PlannedStep:
        """Return the step that runs."""
        return self._plan[0]

    def show(self, status: Status) -> None:
        """Bring the line up to date; where it cannot be written over, every ten seconds."""
        now = time.monotonic()
        if not self._is_terminal and now - self._last_shown < _QUIET_SECONDS:
            return
        self._last_shown = now
        whole = self.seconds_left(status.seconds_left, now)
        left = "" if status.seconds_left is None else f"step {_clock(status.seconds_left)}, "
        self._write(f"{self._prefix()}: {status.text} | left: {left}all {_clock(whole)}")

    def finish_step(self, text: str) -> None:
        """Say how the step ended and go on to the next."""
        self.end_line(f"{self._prefix()}: {text}")
        now = time.monotonic()
        self._expected_of_done += self._plan.pop(0).expected_seconds
        self._step_started, self._last_shown = now, now

    def end_line(self, text: str) -> None:
        """Print a line that stays."""
        self._write(text)
        if self._is_terminal:
            self._stream.write("\n")
        self._width = 0
        self._stream.flush()

    def seconds_left(self, of_step: float | None, now: float) -> float:
        """Return the estimate for all that is left, given the one for this step (None: by its expectation)."""
        in_step, expected = now - self._step_started, self.step.expected_seconds
        if of_step is None:
            pace = self._pace(now - self._started - in_step, self._expected_of_done)
            of_step = max(expected * pace - in_step, 0.0)
        else:
            pace = self._pace(now - self._started + of_step, self._expected_of_done + expected)
        return of_step + pace * sum(step.expected_seconds for step in self._plan[1:])

    @staticmethod
    def _pace(seconds: float, expected: float) -> float:
        """Return actual over expected; 1 as long as there is little to go by."""
        return seconds / expected if expected >= 5.0 else 1.0

    def _prefix(self) -> str:
        return f"[{self.step.number}/{self._num_steps}] {self.step.title}"

    def _write(self, text: str) -> None:
        if not self._is_terminal:
            self._stream.write(text + "\n")
        else:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        self._stream.flush()


class TrainingWatch:
    """Reads the progress of a training run off its `metrics.jsonl`."""

    def __init__(self, metrics: Path, num_iterations: int) -> None:
        self._metrics = metrics
        self._num_iterations = num_iterations
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def __call__(self) -> Status:
        """Return iteration, losses and the time left at the pace seen so far (evaluations included)."""
        rows = read_rows(self._metrics)
        training = [row for row in rows if "lm_loss" in row]
        if not training:
            return Status("starting")
        row, now = training[-1], time.monotonic()
        iteration = int(row["iteration"])
        if self._last is None or self._last[0] != iteration:
            self._last = (iteration, now)
            self._first = self._first or self._last
        text = f"iteration {iteration}/{self._num_iterations}, loss {float(row['lm_loss']):.3f}"
        validation = [row["validation_lm_loss"] for row in rows if "validation_lm_loss" in row]
        if validation:
            text += f", validation {float(validation[-1]):.3f}"
        return Status(text, self._seconds_left(float(row["iteration_ms"]) / 1e3, now))

    def _seconds_left(self, seconds_per_iteration: float, now: float) -> float:
        assert self._first is not None
        assert self._last is not None
        (first, first_time), (last, last_time) = self._first, self._last
        pace = (last_time - first_time) / (last - first) if last > first else seconds_per_iteration
        return max(0.0, (self._num_iterations - last) * pace - (now - last_time))


class LogWatch:
    """Shows the last line that a child printed."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __call__(self) -> Status:
        """Return the last line of the log, or that the program has said nothing so far."""
        lines = last_lines(self._log, 1)
        return Status("starting" if not lines or lines[0].startswith(_COMMAND) else lines[0])


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, a torn last line left out; none when there is no file yet."""
    rows = []
    with suppress(OSError):
        for line in read_text(metrics, errors="replace").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last lines of a log that are not empty."""
    try:
        lines = read_text(log, errors="replace").splitlines()
    except OSError:
        return []
    return [line.rstrip() for line in lines if line.strip()][-count:]


def run_child(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    log: Path,
    watch: Callable[[], Status],
    progress: ProgressLine,
) -> None:
    """Run `command` to its end, its output appended to `log`, showing `watch()` all the while.

    Ctrl-C and SIGTERM are passed on as SIGTERM, at which a training run saves its state.

    Raises:
        ChildFailed: it ended with another code than 0; its last lines have been shown.
        KeyboardInterrupt: it was interrupted and has ended.
    """
    with log.open("ab") as output:
        output.write(f"{_COMMAND}{' '.join(command)}\n".encode())
        output.flush()
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this program alone, which passes on the gentler SIGTERM
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        while child.poll() is None:
            progress.show(watch())
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
    except KeyboardInterrupt:
        _end(child, progress)
        raise
    if child.returncode != 0:
        _report_failure(child.returncode, log, progress)


def _end(child: subprocess.Popen[bytes], progress: ProgressLine) -> None:
    """End a child gently, and at a second Ctrl-C at once."""
    progress.end_line("stopping: the step saves its state (Ctrl-C again: without)")
    child.terminate()
    try:
        child.wait()
    except KeyboardInterrupt:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _report_failure(return_code: int, log: Path, progress: ProgressLine) -> None:
    exit_code = return_code if return_code > 0 else 128 - return_code
    progress.end_line(f"[{progress.step.number}] {progress.step.title}: failed; last lines of {log}:")
    for line in last_lines(log, _LAST_LINES):
        print(f"    {line}", file=sys.stderr)
    raise ChildFailed(f"'{progress.step.title}' ended with exit code {exit_code}; log: {log}", exit_code)


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Inside the context SIGTERM and SIGHUP do what Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
