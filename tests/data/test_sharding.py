"""One job over many nodes: the merged shards are the one run, and none can be missing unnoticed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.data.blocks import RecordKind
from megatron_let.data.input_rules import FoundSource
from megatron_let.data.manifest import Manifest, read_manifest, write_manifest
from megatron_let.data.merge import find_pairs, merge
from megatron_let.data.sharding import Shard, parse_shard, require_whole_jobs, sources_of_shard
from megatron_let.errors import ConfigError
from tests.data.runs import one


def source(number: int, size: int | None) -> FoundSource:
    return FoundSource(f"{number}.jsonl", size, 0, RecordKind.JSON_LINES, is_parquet=False)


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=40), count=st.integers(1, 40))
def test_every_file_is_in_one_shard_in_order_and_no_shard_is_empty(sizes: list[int], count: int) -> None:
    sources = [source(number, size) for number, size in enumerate(sizes)]
    if len(sizes) < count:
        with pytest.raises(ConfigError, match=f"whole files, and there are {len(sizes)}: give at most"):
            sources_of_shard(sources, Shard(0, count))
        return
    parts = [sources_of_shard(sources, Shard(index, count)) for index in range(count)]
    assert [item for part in parts for item in part] == sources
    assert all(parts)


def test_shards_are_near_the_same_size() -> None:
    choose = random.Random(1)
    sources = [source(number, choose.randrange(50, 150)) for number in range(1000)]
    sums = [sum(item.size or 0 for item in sources_of_shard(sources, Shard(i, 16))) for i in range(16)]
    assert max(sums) - min(sums) <= 300  # a file at either end


@pytest.mark.parametrize("word", ["8/8", "1", "1/0", "-1/4", "1/4/4", "a/b", ""])
def test_a_word_that_is_no_shard_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="give I/N, where I counts from 0 to N - 1"):
        parse_shard(word)


def test_standard_input_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match="standard input cannot be divided"):
        sources_of_shard([source(0, 3), source(1, None)], Shard(0, 2))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Return a directory of seven files and others that are left out, and three shards of them below shards/."""
    choose = random.Random(2)
    (tmp_path / "in").mkdir()
    for number in range(7):
        rows = "".join(
            f'{{"text": "{choose.randrange(900)} {number}"}}\n' for _ in range(choose.randint(1, 60))
        )
        (tmp_path / "in" / f"{number}.jsonl").write_text(rows + "{broken\n")
    (tmp_path / "in" / "empty.jsonl").touch()
    (tmp_path / "shards").mkdir()
    for index in range(3):
        shard = Shard(index, 3)
        manifest = one(tmp_path / "shards" / f"all{shard.suffix}", [str(tmp_path / "in")], shard=shard)
        assert (manifest.shard, manifest.unread) == (f"{index}/3", {"empty": 1})
    return tmp_path


def test_merged_shards_are_the_one_run(job: Path) -> None:
    whole = one(job / "whole", [str(job / "in")])
    _, merged = merge(find_pairs([str(job / "shards")]), str(job / "merged"), lambda line: None)
    assert merged is not None
    same = ("tool_version", "skipped_examples")
    assert replace(merged, **{name: getattr(whole, name) for name in same}) == whole
    assert merged.skipped == {"invalid_json": 7}


def test_a_shard_that_is_missing_there_twice_or_of_other_files_is_refused(job: Path) -> None:
    pairs = find_pairs([str(job / "shards")])
    for missing in range(3):
        given = [pair for index, pair in enumerate(pairs) if index != missing]
        with pytest.raises(ConfigError, match=f"2 of the 3 shards of one job .*shard {missing}/3 is missing"):
            merge(given, str(job / "out"), print)
    manifest = read_manifest(pairs[2])
    assert isinstance(manifest, Manifest)
    write_manifest(pairs[2], replace(manifest, shard_of="ab" * 32))  # a node that saw other files
    with pytest.raises(ConfigError, match=r"shard 2/3 is missing"):
        merge(pairs, str(job / "out"), print)
    write_manifest(pairs[2], replace(manifest, shard="1/3"))
    with pytest.raises(ConfigError, match=r"shard 2/3 is missing"):
        merge(pairs, str(job / "out"), print)
    assert not list(job.glob("out*"))
    with pytest.raises(ConfigError, match=r"shard 0/1 \(text\) 2 times: give it once"):
        require_whole_jobs([replace(manifest, shard="0/1")] * 2)
