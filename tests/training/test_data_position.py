"""Where a run stands in its data: every sample once and in order, over a resume on another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_let.errors import EXIT_DONE, EXIT_PREEMPTED
from megatron_let.mcore.index_cache import CachedGPTDataset
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train

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
