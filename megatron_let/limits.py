"""Limits of the machine: those that a run needs, and the one that an error comes from, in one line with its cure."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator

from megatron_let.errors import ConfigError

_LEAST_OPEN_FILES = 256
"""A rank with a data loader, logs and a save in the background holds about a hundred; each peer adds to them."""
_STARTERS = frozenset({"_fork_exec", "_execute_child", "_launch", "fork", "_posix_spawn"})
_OPEN_FILES = ("Too many open files", "received 0 items of ancdata")
_THREADS = ("can't start new thread", "Thread creation failed")
_SHARED_MEMORY = (
    *("unable to allocate shared memory", "unable to write to file </torch_", "/dev/shm"),
    "multiprocessing/synchronize.py",  # locks lie there too
)


def take_open_files() -> None:
    """Raise the limit of open files to what the system allows this program.

    Raises:
        ConfigError: that is too little for a rank.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < _LEAST_OPEN_FILES:
        raise ConfigError(
            f"only {hard} files may be open (ulimit -n), and a rank needs {_LEAST_OPEN_FILES} at least; raise the limit"
        )


def exceeded_limit(error: BaseException) -> str | None:
    """Return the line about the limit of the machine that an error, or what caused it, comes from; None for others."""
    for each in _chain(error):
        number, text = getattr(each, "errno", None), str(each)
        if number == errno.EMFILE or any(sign in text for sign in _OPEN_FILES):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            return f"too many open files: {limit} are allowed (ulimit -n); raise the limit, or lower --num-workers"
        if number == errno.ENFILE:
            return "too many open files on this machine: raise fs.file-max (sysctl)"
        if any(sign in text for sign in _THREADS) or (number == errno.EAGAIN and _was_starting(each)):
            limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
            allowed = "" if limit == resource.RLIM_INFINITY else f" ({limit})"
            return (
                f"no further process or thread can be started: raise ulimit -u{allowed} or the container's limit "
                "(pids.max), or lower --num-workers"
            )
        if number == errno.EADDRINUSE or "EADDRINUSE" in text:
            return f"a port is in use ({_one_line(text)}); give another --master-port (MASTER_PORT)"
        is_full = number == errno.ENOSPC or "No space left on device" in text
        where = f"{text} {getattr(each, 'filename', '')} {' '.join(name for _, name in _frames(each))}"
        if is_full and any(sign in where for sign in _SHARED_MEMORY):
            return f"/dev/shm is full ({_one_line(text)}); enlarge it (docker: --shm-size), or lower --num-workers"
    return None


def free_shared_memory() -> int | None:
    """Return the free bytes of /dev/shm, None where there is none."""
    try:
        state = os.statvfs("/dev/shm")
    except OSError:
        return None
    return state.f_bavail * state.f_frsize


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Go through an error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _was_starting(error: BaseException) -> bool:
    """Return whether an error came up while a program was started."""
    return any(function in _STARTERS for function, _ in _frames(error))


def _frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """Go through (function, file) of an error's traceback."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        yield code.co_name, code.co_filename
        trace = trace.tb_next


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
