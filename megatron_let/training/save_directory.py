"""Can the run save where it is told to? Asked at the start, so that no work is lost at the first checkpoint."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megatron_let.config.run_config import RunConfig
from megatron_let.directory_lock import LOCK_FILE, lock_file_of, owner_of
from megatron_let.errors import ConfigError
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.regular_files import read_text
from megatron_let.training.checkpoint_files import saved_iterations

_PATIENCE_SECONDS = 15.0
"""How long a file that another machine has written may take to be seen on a network file system."""
_POLL_SECONDS = 0.25


def check_save_directory(config: RunConfig, context: ParallelContext) -> None:
    """Make the `--save` directory and see that every rank writes into the same one; every rank calls this.

    A directory that holds another run is refused: its checkpoints would be mixed with this run's, and a resume takes
    what the tracker names.

    Raises:
        ConfigError: it cannot be made or written to, is not one directory for all, is the teacher's, or holds the
            checkpoints of another run.
    """
    if config.checkpoint.save is None:
        return
    root = Path(config.checkpoint.save)
    context.on_rank_0(lambda: _check_content(config, root))
    probe = context.on_rank_0(lambda: _write_probe(root))
    try:
        context.together(lambda: _check_probe(root, probe, context.rank))
        context.together(lambda: _check_access(root))
    finally:
        if context.rank == 0:
            with suppress(OSError):
                (root / probe.name).unlink()


class DirectoryWatch:
    """Tells whether a `--save` directory is still the one that the run began with; for rank 0, which holds its lock."""

    def __init__(self, root: Path) -> None:
        """Remember the directory's lock file; without one nothing can be told."""
        self._root = root
        self._lock_file: int | None = None
        with suppress(OSError):
            self._lock_file = lock_file_of(root)

    def change(self) -> ConfigError | None:
        """Return what to say when the directory was removed, renamed or taken by another run. Raises OSError."""
        if self._lock_file is None:
            return None
        now = lock_file_of(self._root)
        if now == self._lock_file:
            return None
        gone = f"{LOCK_FILE} is gone from it" if self._root.is_dir() else "it is gone"
        what = gone if now is None else "another run has taken it"
        return ConfigError(
            f"--save {self._root} is no longer the directory that this run began with ({what}): nothing more is saved there; "
            "put it back, or give another, and start again"
        )


def _check_content(config: RunConfig, root: Path) -> None:
    teacher, load = config.let.let_teacher_load, config.checkpoint.load
    if teacher is not None and _is_same(teacher, root):
        raise ConfigError(f"--save {root} is the teacher's directory; give the run a directory of its own")
    iterations = saved_iterations(root)
    if not iterations:
        return
    holds = f"--save {root} already holds the checkpoint of iteration {iterations[0]}"
    if load is None or not _is_same(load, root):
        raise ConfigError(
            f"{holds}; give --load {root} to go on with that run, or another directory for a new one"
        )
    if config.checkpoint.finetune:
        raise ConfigError(
            f"{holds} and --finetune counts from 0 again; give another --save, or leave out --finetune to resume"
        )


def _is_same(left: str | Path, right: str | Path) -> bool:
    return os.path.realpath(left) == os.path.realpath(right)


class _Probe(NamedTuple):
    """A file that rank 0 writes and that every rank must see."""

    name: str
    text: str
    place: str
    """Where rank 0 has written it, in words."""


def _write_probe(root: Path) -> _Probe:
    """Write a file; raise ConfigError unless that works."""
    host, token = socket.gethostname(), secrets.token_hex(8)
    probe = _Probe(f".write_test.{token}", token, f"{root.absolute()} (rank 0 on {host})")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / probe.name).write_text(probe.text)
    except OSError as problem:
        raise ConfigError(_unwritable(root, problem)) from problem
    return probe


def _check_probe(root: Path, probe: _Probe, rank: int) -> None:
    """Raise ConfigError unless this rank, perhaps on another machine, sees what rank 0 has written."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _is_there(root, probe):
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"--save {root} is not one directory for all ranks: what was written to {probe.place} is not in "
                f"{root.absolute()} (rank {rank} on {socket.gethostname()}); give a directory that all nodes share"
            )
        time.sleep(_POLL_SECONDS)


def _is_there(root: Path, probe: _Probe) -> bool:
    try:
        os.listdir(root)  # refreshes what a network file system remembers of it
        return read_text(root / probe.name) == probe.text
    except OSError:
        return False


def _check_access(root: Path) -> None:
    """Raise ConfigError unless this rank, perhaps on another machine than rank 0, sees and may write the directory."""
    if not os.access(root, os.W_OK | os.X_OK):
        raise ConfigError(_unwritable(root, PermissionError(errno.EACCES, os.strerror(errno.EACCES))))


def _unwritable(root: Path, problem: OSError) -> str:
    why = problem.strerror or str(problem)
    if problem.errno == errno.EACCES and root.is_dir():
        why = f"{why}: {owner_of(root)}"
    return f"--save {root} cannot be written to ({why}); give a directory that all ranks may write to"
