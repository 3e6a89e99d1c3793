"""The index cache of a run on several nodes: built once where nodes share its directory, once a node where they do not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from megatron_let.errors import ConfigError
from megatron_let.mcore import index_cache
from megatron_let.mcore.datasets import SampleCounts, build_datasets
from megatron_let.mcore.parallel import parallel_context
from megatron_let.testing.distributed import RankPool
from tests.mcore.test_datasets import Tokenizer, config_of
from tests.mcore.test_index_cache import write

SAMPLES = 20


def build_on_node(paths: list[Any], caches: list[Path]) -> tuple[int, list[list[int]], str]:
    """Build the indices as one of two ranks of each node, a cache a node; return files put there, samples and refusal."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)  # the pool puts back what a case changes
    config = config_of(paths, split="1,0,0", data_cache_path=caches[rank // 2])
    put: list[str] = []
    put_there = index_cache._put

    def count(source: str, target: str) -> None:
        put.append(target)
        put_there(source, target)

    with parallel_context(config) as context, patch.object(index_cache, "_put", count):
        try:
            train: Any = build_datasets(config, Tokenizer(), SampleCounts(SAMPLES, 0, 0), context).train
        except ConfigError as mistake:
            return len(put), [], str(mistake)
    return len(put), [train[index]["tokens"].tolist() for index in range(SAMPLES)], ""


@pytest.mark.parametrize(("shared", "built"), [(True, [11, 0, 0, 0]), (False, [11, 0, 11, 0])])
def test_one_rank_of_a_node_builds_what_the_node_does_not_find(
    shared: bool, built: list[int], tmp_path: Path, pool: RankPool
) -> None:
    path = [0.3, write(tmp_path / "one"), 0.7, write(tmp_path / "two", first=7)]
    caches = [tmp_path / "cache", tmp_path / ("cache" if shared else "other")]
    results = pool.run(4, build_on_node, path, caches)
    assert [count for count, _, _ in results] == built, "2 data sets of 4 files and a blend of 3"
    assert all(samples == results[0][1] for _, samples, _ in results)
    files = [{file.name: np.fromfile(file, np.uint8) for file in cache.glob("*.npy")} for cache in caches]
    assert files[0].keys() == files[1].keys()
    assert all(np.array_equal(files[0][name], files[1][name]) for name in files[0])


def test_a_node_that_cannot_keep_its_cache_ends_all_ranks_with_its_line(
    tmp_path: Path, pool: RankPool
) -> None:
    results = pool.run(4, build_on_node, [write(tmp_path / "one")], [tmp_path / "cache", Path("/proc/no")])
    assert len({refusal for _, _, refusal in results}) == 1
    assert "the index of the samples cannot be kept in /proc/no" in results[0][2]
