"""Saving in threads: what reaches the files, who waits for whom, what is left when it goes wrong."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_let.errors import EXIT_CRASH, EXIT_DONE, LetError
from megatron_let.mcore import checkpoint_writer
from megatron_let.mcore.checkpoint_writer import Content
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, assert_bitwise, train
from megatron_let.training import checkpoint_files as files
from megatron_let.training.trainer import Trainer
from tests.processes import HANG_SECONDS

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2-distributed-optimizer": (2, {"--use-distributed-optimizer": None}),
    "tp2-pp2": (4, {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2}),
}


@pytest.fixture
def words(token_files: Path, tmp_path: Path) -> dict[str, Any]:
    return {"--data-path": token_files, "--save": tmp_path / "run", "--save-interval": 2}


def train_with_a_late_write(argv: list[str]) -> int:
    """Train; the write of the first checkpoint begins after iteration 5. Return the iteration that it began after."""
    began = list[int]()
    iteration = 0
    changed = threading.Condition()
    write, step = Content.write, Trainer.step

    def late_write(content: Content) -> Any:
        with changed:
            if not began:
                assert changed.wait_for(lambda: iteration >= 5, timeout=HANG_SECONDS)
                began.append(iteration)
                changed.notify_all()
        return write(content)

    def counted_step(trainer: Trainer, iterators: Any) -> None:
        nonlocal iteration
        step(trainer, iterators)
        with changed:
            iteration = trainer.state.iteration
            changed.notify_all()
            if iteration == 5:
                changed.wait_for(lambda: bool(began), timeout=HANG_SECONDS)

    with patch.object(Content, "write", late_write), patch.object(Trainer, "step", counted_step):
        assert train(argv) == EXIT_DONE
    return began[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_change_during_the_write_do_not_reach_the_file(
    layout: str, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    base = {**words, **flags, "--train-iters": 6, "--save-interval": 3}
    pool.run(world_size, train, arguments(TINY_STUDENT, {**base, "--save": tmp_path / "still"}))
    began = pool.run(
        world_size, train_with_a_late_write, arguments(TINY_STUDENT, {**base, "--async-save": None})
    )
    assert began == [5] * world_size
    for iteration in (3, 6):
        assert_bitwise(tmp_path / "still", tmp_path / "run", iteration)


def fail_at(name: str, rank: int, error: OSError, argv: list[str]) -> tuple[int, str] | None:
    """Train, with `name` failing on one rank from the second checkpoint on; return code and message of the end."""
    module, name = name.split(".")
    owner: Any = Content if module == "content" else files
    action, calls = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 and int(os.environ["RANK"]) == rank:
            raise error
        return action(*args, **kwargs)

    with patch.object(owner, name, failing):
        try:
            train(argv)
        except LetError as problem:
            return problem.exit_code, str(problem)
    return None


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILURES = {
    "data of rank 1": ("content.write", 1),
    "data of rank 0": ("content.write", 0),
    "what belongs to all": ("content.finish", 0),
    "checksums": ("files.describe_files", 0),
    "manifest and tracker": ("files.finish", 0),
    "directory": ("files.prepare_partial", 0),
}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_all_ranks_say_what_to_do(
    where: str, is_async: bool, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    name, rank = FAILURES[where]
    flags = {"--async-save": None} if is_async else {}
    argv = arguments(TINY_STUDENT, {**words, **flags, "--train-iters": 5})
    ends = pool.run(2, fail_at, name, rank, FULL, argv)
    root = tmp_path / "run"
    message = (
        f"cannot write a checkpoint to {root}: No space left on device; free space or fix the directory and resume, the "
        "previous checkpoint is untouched"
    )
    assert ends == [(EXIT_CRASH, message)] * 2
    assert files.saved_iterations(root) == [2]
    assert files.read_tracker(root) == 2
    assert files.find_damage(root / "iter_0000002") is None
    assert not list(root.glob("*.partial"))


def test_a_failure_in_the_background_ends_the_run_at_the_next_iteration(
    words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    argv = arguments(TINY_STUDENT, {**words, "--async-save": None, "--train-iters": 500})
    assert pool.run(2, fail_at, "content.write", 1, FULL, argv)[0]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) < 20


def test_a_write_that_does_not_read_back_is_no_checkpoint(
    words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    messages = pool.run(1, train_on_a_bad_disk, arguments(TINY_STUDENT, words))
    assert "does not read back as it was written" in str(messages[0])
    assert files.saved_iterations(tmp_path / "run") == []


def train_on_a_bad_disk(argv: list[str]) -> str | None:
    """Train; one bit of each file changes between writing and reading back."""
    verify = checkpoint_writer.verify

    def flip(path: Path, entry: dict[str, object]) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        verify(path, entry)

    with patch.object(checkpoint_writer, "verify", flip):
        try:
            train(argv)
        except LetError as problem:
            return str(problem)
    return None


def test_a_checkpoint_that_does_not_fit_is_not_begun(
    words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    messages = pool.run(
        2, train_with_free_bytes, 1 << 20, arguments(TINY_STUDENT, words), timeout=HANG_SECONDS
    )
    assert messages[0] == messages[1]
    assert f"cannot write a checkpoint to {tmp_path / 'run'}: it takes 0.02 GB and 0.00 GB are free" in str(
        messages[0]
    )
    assert not list((tmp_path / "run").glob("iter_*"))
    assert pool.run(2, train_with_free_bytes, 1 << 30, arguments(TINY_STUDENT, words)) == [None, None]


def train_with_free_bytes(free: int, argv: list[str]) -> str | None:
    """Train on a disk with so much free."""
    with patch.object(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free)):
        try:
            train(argv)
        except LetError as problem:
            return str(problem)
    return None


def test_a_slow_disk_is_no_communication_timeout(words: dict[str, Any], pool: RankPool) -> None:
    argv = arguments(TINY_STUDENT, {**words, "--train-iters": 2})
    codes = pool.run(2, train_on_a_slow_disk, argv, init_process_group=False)
    assert codes == [EXIT_DONE, EXIT_DONE]


def train_on_a_slow_disk(argv: list[str]) -> int:
    """Train with collectives limited to 4 seconds, while rank 0 takes 6 to write its part and 6 to finish."""

    def slow(action: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*args: Any) -> Any:
            if os.environ["RANK"] == "0":
                time.sleep(6)
            return action(*args)

        return slowed

    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    try:
        with (
            patch.object(Content, "write", slow(Content.write)),
            patch.object(Content, "finish", slow(Content.finish)),
        ):
            return train(argv)
    finally:
        dist.destroy_process_group()


def test_old_checkpoints_go_when_newer_ones_are_whole(
    words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    base = {**words, "--train-iters": 7, "--save-interval": 1}
    for flags, kept in (
        ({"--save-keep-last": 3}, [7, 6, 5]),
        ({"--save-retain-interval": 3}, [7, 6, 3]),
        ({"--save-keep-last": 2, "--save-retain-interval": 4, "--async-save": None}, [7, 6, 4]),
    ):
        root = tmp_path / "".join(flags)
        pool.run(1, train, arguments(TINY_STUDENT, {**base, **flags, "--save": root}))
        assert files.saved_iterations(root) == kept
        assert all(files.find_damage(files.iteration_directory(root, i)) is None for i in kept)
        assert not list(root.glob("*.partial"))


def test_every_data_parallel_rank_has_the_random_states_that_are_saved(
    words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    argv = arguments(TINY_STUDENT, {**words, "--hidden-dropout": 0.1, "--attention-dropout": 0.1})
    first, second = pool.run(2, random_states_after_training, argv)
    assert first == second
    other = arguments(TINY_STUDENT, {**words, "--seed": 1, "--save": tmp_path / "other"})
    assert first != pool.run(1, random_states_after_training, other)[0]


def random_states_after_training(argv: list[str]) -> tuple[bytes, ...]:
    """Return the random states of Python, NumPy, torch and Megatron's tracker as they are at the last save."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states: list[tuple[bytes, ...]] = []
    write = Content.copy

    def look(content: Content) -> None:
        tracked = get_cuda_rng_tracker().get_states()
        states.append(
            (
                repr(random.getstate()).encode(),
                repr(np.random.get_state()).encode(),
                torch.get_rng_state().numpy().tobytes(),
                *(bytes(tracked[name].numpy().tobytes()) for name in sorted(tracked)),
            )
        )
        write(content)

    with patch.object(Content, "copy", look):
        train(argv)
    return states[-1]
