"""A save directory that fails while a run writes to it: not shared, full, or taken away. One line from all ranks."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_let.directory_lock import LOCK_FILE, lock_directory
from megatron_let.errors import EXIT_BAD_CONFIGURATION, EXIT_CRASH, LetError
from megatron_let.mcore import checkpoint_writer
from megatron_let.mcore.checkpoint_writer import Content
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train
from megatron_let.training import checkpoint_files as files
from megatron_let.training import saving
from megatron_let.training.trainer import Trainer
from tests.processes import HANG_SECONDS


@pytest.fixture
def words(token_files: Path, tmp_path: Path) -> dict[str, Any]:
    return {"--data-path": token_files, "--save": tmp_path / "run", "--save-interval": 2}


def train_with(owner: Any, name: str, changed: Callable[..., Any], argv: list[str]) -> tuple[int, str] | None:
    """Train with another function in a place of the program; return code and message of the end."""
    with patch.object(owner, name, changed), patch.object(saving, "_PATIENCE_SECONDS", 0.5):
        try:
            train(argv)
        except LetError as problem:
            return problem.exit_code, str(problem)
    return None


def train_while_a_node_writes_to_its_own_disk(argv: list[str]) -> tuple[int, str] | None:
    """Train; what rank 1 writes is soon not where it was written."""
    write = Content.write

    def elsewhere(content: Content) -> Any:
        written = write(content)
        if os.environ["RANK"] == "1":
            for name in written.files:
                (content._directory / name).unlink()
        return written

    return train_with(Content, "write", elsewhere, argv)


def test_a_file_that_rank_0_does_not_see_is_told_by_rank_and_host(
    words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    ends = pool.run(
        2, train_while_a_node_writes_to_its_own_disk, arguments(TINY_STUDENT, words), timeout=HANG_SECONDS
    )
    host = socket.gethostname()
    message = (
        f"cannot write a checkpoint to {tmp_path / 'run'}: __1_0.distcp, which rank 1 on {host} has written, is not there "
        f"for rank 0 on {host}: all nodes must share that directory; free space or fix the directory and resume, the "
        "previous checkpoint is untouched"
    )
    assert ends == [(EXIT_CRASH, message)] * 2
    assert files.saved_iterations(tmp_path / "run") == []
    assert not list((tmp_path / "run").glob("*.partial"))


def train_on_a_disk_that_fills(argv: list[str]) -> tuple[int, str] | None:
    """Train; the disk takes 100 kB of each file, which is in the middle of a tensor."""
    write = checkpoint_writer._Hashing.write

    def short(stream: Any, data: Any) -> int:
        stream._file = _FullFile(stream._file)
        return write(stream, data)

    return train_with(checkpoint_writer._Hashing, "write", short, argv)


class _FullFile:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        if self._file.tell() > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_disk_that_fills_in_the_middle_of_a_file_is_one_line(
    words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    """torch writes a tensor in pieces, and tells of a wrong position when one of them fails."""
    ends = pool.run(1, train_on_a_disk_that_fills, arguments(TINY_STUDENT, words))
    assert ends[0] is not None
    assert ends[0][0] == EXIT_CRASH
    assert "No space left on device; free space or fix the directory and resume" in ends[0][1]
    assert not list((tmp_path / "run").glob("iter_*"))


def lose(root: Path, how: str) -> None:
    """Take the directory away from the run that writes to it."""
    if how == "renamed":
        root.rename(root.with_name("elsewhere"))
    elif how == "removed":
        shutil.rmtree(root)
    elif how == "taken":
        shutil.rmtree(root)
        root.mkdir()
        (root / LOCK_FILE).write_text("another run")
        (root / "iter_0000009.partial").mkdir()
    else:
        (root / LOCK_FILE).unlink()


def train_and_lose_the_directory(root: Path, how: str, argv: list[str]) -> tuple[int, str] | None:
    """Train, with a lock as the program takes one; the directory is lost after the iteration before the second save."""
    root.mkdir()
    lock, step = lock_directory(root), Trainer.step

    def losing(trainer: Trainer, iterators: Any) -> None:
        step(trainer, iterators)
        if trainer.state.iteration == 3:
            lose(root, how)

    try:
        return train_with(Trainer, "step", losing, argv)
    finally:
        assert lock is not None
        lock.release()


LOST = {
    "renamed": "it is gone",
    "removed": "it is gone",
    "taken": "another run has taken it",
    "unlocked": "run.lock is gone from it",
}


@pytest.mark.parametrize("how", LOST)
def test_a_directory_that_is_lost_while_training_is_noticed_at_the_next_save(
    how: str, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    argv = arguments(TINY_STUDENT, {**words, "--train-iters": 5})
    assert pool.run(1, train_and_lose_the_directory, root, how, argv) == [
        (
            EXIT_BAD_CONFIGURATION,
            f"--save {root} is no longer the directory that this run began with ({LOST[how]}): nothing more is saved there; "
            "put it back, or give another, and start again",
        )
    ]
    left = {"taken": [LOCK_FILE, "iter_0000009.partial"], "unlocked": None}.get(how, [])
    if left is not None:
        assert sorted(path.name for path in root.glob("*")) == sorted(left)
