"""Data, a teacher and start weights that the training tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.testing.training import TINY_STUDENT, arguments, train, write_token_files
from tests.training.our_side import EOD, Ours


@pytest.fixture(scope="session")
def token_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of a small data set with document ends everywhere and some samples of nothing else.

    With --eod-mask-loss the loss masks of its microbatches all differ, and some microbatches count no token.
    """
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    random = np.random.default_rng(7)
    documents: list[list[int]] = []
    for index in range(300):
        length = int(random.integers(3, 40))
        start, step = random.integers(0, EOD), random.integers(1, 4)
        documents.append([*((start + step * np.arange(length)) % EOD).tolist(), EOD])
        if index % 10 == 0:
            documents.append([EOD] * 70)
    write_token_files(prefix, documents)
    return prefix


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random LLaMA-style Hugging Face teacher of another width than the student."""
    directory = tmp_path_factory.mktemp("teacher")
    write_tiny_teacher("llama", directory)
    return directory


@pytest.fixture(scope="session")
def start(pool: RankPool, token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of the tiny student after two plain iterations, from which layouts are compared."""
    directory = tmp_path_factory.mktemp("start")
    changes = {"--data-path": token_files, "--train-iters": 2, "--save": directory}
    pool.run(1, train, arguments(TINY_STUDENT, changes))
    return directory


@pytest.fixture(scope="session")
def megatron_teacher(pool: RankPool, token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Megatron checkpoint that was trained with dropout, of which a teacher must have none."""
    directory = tmp_path_factory.mktemp("megatron_teacher")
    dropout = {"--hidden-dropout": 0.1, "--attention-dropout": 0.1}
    changes = {"--data-path": token_files, "--train-iters": 1, "--save": directory, **dropout}
    pool.run(1, train, arguments(TINY_STUDENT, changes))
    return directory


@pytest.fixture(scope="session")
def ours(pool: RankPool, token_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """Return the maker of our side."""
    return Ours(pool, token_files, tmp_path_factory.mktemp("spread"))


@pytest.fixture(scope="session")
def let_from_start(token_files: Path, teacher: Path, start: Path) -> dict[str, Any]:
    """Return the flags of LET on layer 2 from the start checkpoint, with loss masks that differ."""
    return {
        "--data-path": token_files,
        "--eod-mask-loss": None,
        "--load": start,
        "--finetune": None,
        "--let-teacher-load": teacher,
        "--let-student-layer": 2,
    }
