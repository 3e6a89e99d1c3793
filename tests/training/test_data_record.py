"""A resume goes on with the data of its checkpoint: each change of them is refused by name, or accepted by flag."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_let.errors import EXIT_DONE
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train, write_token_files
from tests.training.bad_input import refusal, run


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with data sets `a` and `b` that differ, of 40 samples or so each."""
    directory = tmp_path_factory.mktemp("blend")
    for name, seed in (("a", 1), ("b", 2)):
        write_token_files(directory / name, documents(seed))
    return directory


def documents(seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 59, size=20).tolist() for _ in range(64)]


@pytest.fixture(scope="module")
def original(pool: RankPool, blend: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of two iterations on the blend."""
    directory = tmp_path_factory.mktemp("original")
    pool.run(1, train, arguments(TINY_STUDENT, {**settings(blend), "--save": directory}))
    return directory


def settings(blend: Path) -> dict[str, Any]:
    return {"--data-path": [0.25, blend / "a", 0.75, blend / "b"], "--split": "90,5,5", "--train-iters": 2}


@pytest.fixture
def words(original: Path, blend: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a run of two more iterations."""
    saved = shutil.copytree(original, tmp_path / "run")
    return {**settings(blend), "--train-iters": 4, "--save": saved, "--load": saved}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "split": ({"--split": "80,10,10"}, "--split 80,10,10 (checkpoint: 90,5,5)"),
    "sequence length": ({"--seq-length": 16}, "--seq-length 16 (checkpoint: 32)"),
    "seed": ({"--seed": 7}, "--seed 7 (checkpoint: 1234)"),
    "global batch": ({"--global-batch-size": 4}, "--global-batch-size 4 (checkpoint: 8)"),
    "made-up data": (
        {"--data-path": False, "--split": False, "--mock-data": None},
        "0 training data sets (checkpoint: 2)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_of_the_data_is_refused_by_name_and_accepted_by_flag(
    change: str, words: dict[str, Any], pool: RankPool
) -> None:
    changes, named = CHANGES[change]
    message = refusal(pool, {**words, **changes}, untouched=words["--save"])
    assert f"checkpoint {words['--save']}/iter_0000002 was trained on other data: " in message
    assert named in message
    assert "--data-override" in message
    result = run(pool, {**words, **changes, "--data-override": None}, world_size=1)
    assert result.code == EXIT_DONE
    assert any(line.startswith("WARNING") and named in line for line in result.lines)


def test_another_blend_is_refused_and_the_same_one_elsewhere_is_not(
    words: dict[str, Any], blend: Path, pool: RankPool, tmp_path: Path
) -> None:
    for weights, named in (
        ([0.5, blend / "a", 0.5, blend / "b"], "blend weights [0.5, 0.5] (checkpoint: [0.25, 0.75])"),
        ([0.25, blend / "b", 0.75, blend / "a"], f"data set {blend / 'b'} holds other tokens"),
        ([blend / "a"], "1 training data sets (checkpoint: 2)"),
    ):
        assert named in refusal(pool, {**words, "--data-path": weights})
    moved = shutil.copytree(blend, tmp_path / "moved")
    same = {**words, "--data-path": [1, moved / "a", 3, moved / "b"]}
    assert run(pool, same, world_size=1).code == EXIT_DONE


def test_other_tokens_of_the_same_lengths_are_noticed(
    words: dict[str, Any], blend: Path, pool: RankPool, tmp_path: Path
) -> None:
    moved = shutil.copytree(blend, tmp_path / "moved")
    ids = bytearray((moved / "b.bin").read_bytes())
    ids[-2] ^= 1
    (moved / "b.bin").write_bytes(ids)
    changed = {**words, "--data-path": [0.25, moved / "a", 0.75, moved / "b"]}
    message = refusal(pool, changed)
    assert message.split("; ")[0].endswith(
        f"was trained on other data: data set {moved / 'b'} holds other tokens"
    )


def test_a_longer_run_that_shuffles_more_epochs_is_refused(
    words: dict[str, Any], blend: Path, pool: RankPool, tmp_path: Path
) -> None:
    """One epoch has some 35 samples: 4 iterations of 8 stay within it, 20 do not."""
    one = {"--data-path": blend / "a", "--split": "100,0,0", "--load": False, "--train-iters": 2}
    first = {**words, **one, "--save": tmp_path / "one"}
    pool.run(1, train, arguments(TINY_STUDENT, first))
    longer = {**first, "--load": tmp_path / "one"}
    message = refusal(pool, {**longer, "--train-iters": 20})
    assert "is another one: a longer run may shuffle more epochs" in message
    assert run(pool, {**longer, "--train-iters": 4}, world_size=1).code == EXIT_DONE
    assert run(pool, {**longer, "--train-iters": 20, "--data-override": None}, world_size=1).code == EXIT_DONE


def test_weights_alone_may_go_on_with_any_data(
    words: dict[str, Any], token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    other = {**words, "--data-path": token_files, "--save": tmp_path / "new"}
    assert run(pool, {**other, "--finetune": None}, world_size=1).code == EXIT_DONE
    evaluation = {"--skip-train": None, "--eval-iters": 1, "--save": False}
    assert run(pool, {**other, **evaluation}, world_size=1).code == EXIT_DONE
