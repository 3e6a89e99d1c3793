"""Where a run stands in its data: every sample once and in order, over a resume on another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_let.errors import EXIT_DONE, EXIT_PREEMPTED
from megatron_let.mcore.index_cache import CachedGPTDataset
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    metrics_rows,
    train,
    training_rows,
    write_token_files,
)
from megatron_let.training.saved_run import with_consumed_tokens
from tests.training.hostile import seal

GLOBAL_BATCH, CUT, ITERATIONS = 8, 2, 5


def train_and_record(argv: list[str]) -> tuple[int, list[int]]:
    """Train on this rank; return the exit code and the samples it read, in order."""
    read: list[int] = []
    original = CachedGPTDataset.__getitem__

    def recorded(self: CachedGPTDataset, index: int) -> Any:
        read.append(int(index))
        return original(self, index)

    with patch.object(CachedGPTDataset, "__getitem__", recorded):
        return train(argv), read


def global_batches(
    pool: RankPool, layout: tuple[int, int], flags: dict[str, Any], code: int
) -> list[list[int]]:
    """Run on `layout` (data-parallel ranks, micro-batch size); return the samples of each iteration, sorted."""
    ranks, micro = layout
    words = arguments(TINY_STUDENT, {**flags, "--micro-batch-size": micro})
    outcomes = pool.run(ranks, train_and_record, words)
    assert {outcome[0] for outcome in outcomes} == {code}
    share = GLOBAL_BATCH // ranks
    iterations = len(outcomes[0][1]) // share
    assert [len(read) for _, read in outcomes] == [iterations * share] * ranks
    return [
        sorted(index for _, read in outcomes for index in read[number * share : (number + 1) * share])
        for number in range(iterations)
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 1), (2, 4))],
    ids=["dp 2 to 1", "dp 1 to 2, half the micro-batch", "four times the micro-batch"],
)
def test_a_resume_on_another_layout_reads_on_where_the_run_stopped(
    before: tuple[int, int], after: tuple[int, int], token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    flags = {"--data-path": token_files, "--train-iters": ITERATIONS, "--global-batch-size": GLOBAL_BATCH}
    flags |= {"--save": tmp_path, "--load": tmp_path, "--data-cache-path": tmp_path / "cache"}
    first = global_batches(pool, before, {**flags, "--exit-interval": CUT}, EXIT_PREEMPTED)
    second = global_batches(pool, after, flags, EXIT_DONE)
    assert (len(first), len(second)) == (CUT, ITERATIONS - CUT)
    assert first + second == [
        list(range(number * GLOBAL_BATCH, (number + 1) * GLOBAL_BATCH)) for number in range(ITERATIONS)
    ]


def forget_tokens(directory: Path) -> None:
    """Make a checkpoint one of the first versions, which counted samples alone."""
    path = directory / "common.pt"
    common = torch.load(path, weights_only=False)
    del common["megatron_let"]["state"]["consumed_tokens"]
    torch.save(common, path)
    seal(directory)


@pytest.mark.parametrize("is_old", [False, True], ids=["now", "of an old checkpoint"])
def test_tokens_are_counted_with_the_length_that_each_sample_had(
    is_old: bool, token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    words = {"--data-path": token_files, "--train-iters": 6, "--global-batch-size": 2, "--eval-iters": 1}
    words |= {"--save": tmp_path, "--load": tmp_path}
    assert pool.run(1, train, arguments(TINY_STUDENT, {**words, "--exit-interval": 3})) == [EXIT_PREEMPTED]
    if is_old:
        forget_tokens(tmp_path / "iter_0000003")
    longer = {**words, "--seq-length": 64, "--data-override": None}
    assert pool.run(1, train, arguments(TINY_STUDENT, longer)) == [EXIT_DONE]
    assert [row["consumed_tokens"] for row in training_rows(tmp_path)] == [64, 128, 192, 320, 448, 576]
    last = [row for row in metrics_rows(tmp_path) if "validation_lm_loss" in row][-1]
    assert last["consumed_tokens"] == 576


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"state": [], "config": {"model": {"seq_length": 4}}},
        {"state": {"consumed_samples": "3"}, "config": {"model": {"seq_length": 1 << 62}}},
        {"state": {"consumed_samples": 3}, "config": {"model": {"seq_length": "long"}}},
        {"state": {"consumed_samples": 3}, "config": {"model": 7}},
        {"state": {"consumed_samples": 3}, "config": {}},
        {"state": {"consumed_samples": 3, "consumed_tokens": 5}, "config": {"model": {"seq_length": 4}}},
    ],
)
def test_tokens_are_made_up_of_nothing_else(run: dict[str, Any]) -> None:
    assert with_consumed_tokens(run) == run


def test_a_run_counted_in_samples_ends_with_its_data_within_the_ramp_up(
    pool: RankPool, tmp_path: Path
) -> None:
    """The data hold 30 samples and are read once; the iteration that would begin after them is none."""
    write_token_files(tmp_path / "short", [list(range(30)) * 32, [1]])  # 961 tokens: 30 samples of 32
    words = {"--train-data-path": tmp_path / "short", "--train-iters": False, "--train-samples": 30}
    words |= {"--rampup-batch-size": (2, 2, 40), "--save": tmp_path / "run"}
    assert pool.run(1, train, arguments(TINY_STUDENT, words)) == [EXIT_DONE]
    rows = training_rows(tmp_path / "run")
    assert [row["global_batch_size"] for row in rows] == [2] * 7 + [4] * 4
    assert rows[-1]["consumed_samples"] == 30
