"""Limits of the machine end a program with code 2 and one line that says which limit."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_let.limits import exceeded_limit, free_shared_memory
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[1]

OPENS_FILES = """
import os
from megatron_let.entry import end_program, run_main
def main(report):
    files = []
    try:
        while True:
            files.append(open(os.devnull))
    except OSError as error:
        files.clear()
        raise RuntimeError("while loading") from error
end_program(run_main(main))
"""


def test_too_many_open_files_are_one_line_and_code_2() -> None:
    command = [
        "bash",
        "-c",
        'ulimit -Sn 100; ulimit -Hn 300; exec "$@"',
        "shell",
        sys.executable,
        "-c",
        OPENS_FILES,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (  # the limit itself is what the system allows, not what the shell had set
        "error: too many open files: 300 are allowed (ulimit -n); raise the limit, or lower --num-workers\n"
    )


@pytest.mark.parametrize("module", ["megatron_let.launch", "pretrain_let"])
def test_a_limit_that_no_rank_can_live_with_is_refused_at_the_start(module: str) -> None:
    words = ["--nproc-per-node", "2", "pretrain_let.py"] if module == "megatron_let.launch" else []
    command = [*("bash", "-c", 'ulimit -n 64; exec "$@"', "shell"), sys.executable, "-m", module, *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: only 64 files may be open (ulimit -n), and a rank needs 256 at least; raise the limit\n"
    )


def start_a_program() -> None:
    """Fork where the system refuses it."""

    def fork() -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    fork()


def make_a_lock() -> None:
    """Make a lock where shared memory is full."""
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    with patch("multiprocessing.synchronize._multiprocessing.SemLock", full):
        get_context("fork").Lock()


def read_from_a_pipe() -> None:
    """Read what is not there yet."""
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def raising(error: Exception) -> Callable[..., None]:
    """Return a function that raises this."""

    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "named"),
    [
        (start_a_program, "no further process or thread can be started: raise ulimit -u"),
        (raising(RuntimeError("can't start new thread")), "no further process or thread can be started"),
        (raising(OSError(errno.ENFILE, "x")), "too many open files on this machine: raise fs.file-max"),
        (raising(RuntimeError("received 0 items of ancdata")), "too many open files: "),
        (
            raising(RuntimeError("failed to listen. port: 29500, code: -98, name: EADDRINUSE")),
            "a port is in use (failed to listen. port: 29500, code: -98, name: EADDRINUSE); give another",
        ),
        (
            raising(RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")),
            "/dev/shm is full (unable to write to file </torch_1_2>",
        ),
        (raising(OSError(errno.ENOSPC, "No space left on device", "/dev/shm/sem.1")), "/dev/shm is full"),
        (make_a_lock, "/dev/shm is full"),
    ],
)
def test_the_limit_is_named_also_when_it_is_a_cause(fail: Callable[[], None], named: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fail()
    effect = RuntimeError("while loading")
    effect.__cause__ = caught.value
    line = exceeded_limit(effect)
    assert line is not None
    assert line.startswith(named)


@pytest.mark.parametrize(
    "fail",
    [
        read_from_a_pipe,
        raising(OSError(errno.ENOSPC, "No space left on device", "/data/x")),
        raising(KeyError("x")),
    ],
)
def test_other_errors_are_no_limits(fail: Callable[[], None]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fail()
    assert exceeded_limit(caught.value) is None


def test_the_room_in_shared_memory_is_known() -> None:
    free = free_shared_memory()
    assert free is None or free >= 0
