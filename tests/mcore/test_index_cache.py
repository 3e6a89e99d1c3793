"""The index cache: never another data set's, never half of one, and built again when it does not fit."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.identity import data_identity
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.datasets import SampleCounts, build_datasets_alone
from megatron_let.testing.training import write_token_files
from tests.data.foreign import write_as_neox
from tests.mcore.test_datasets import Tokenizer, config_of

SAMPLES = 20
GPT_KINDS = ("document_index", "sample_index", "shuffle_index")
BLEND_KINDS = ("dataset_index", "dataset_sample_index")


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return what the package logs, growing."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    lines: list[str] = []
    caplog.set_level(logging.WARNING)
    caplog.handler.addFilter(lambda record: lines.append(record.getMessage()) or True)  # type: ignore[func-returns-value]
    yield lines
    caplog.handler.filters.clear()


def write(prefix: Path, *, documents: int = 30, length: int = 40, first: int = 0) -> Path:
    """Write a data set whose tokens count upwards from `first`; the documents' lengths go up and down."""
    lengths = [length + (number % 5) - 2 for number in range(documents)]
    write_token_files(prefix, [[*((first + np.arange(n - 1)) % 60).tolist(), 60] for n in lengths])
    return prefix


def read(path: Any, cache: Path | None, **flags: Any) -> torch.Tensor:
    """Return the tokens of the training samples, [SAMPLES, sequence]."""
    place = {} if cache is None else {"data_cache_path": cache}
    config = config_of(path, split="1,0,0", **place, **flags)
    train = build_datasets_alone(config, Tokenizer(), SampleCounts(SAMPLES, 0, 0)).train
    return torch.stack([train[index]["tokens"] for index in range(SAMPLES)])


def files_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.iterdir())}


def state_of(cache: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in cache.iterdir()}


@pytest.mark.parametrize("is_blend", [False, True], ids=["one", "blend"])
def test_data_written_anew_under_the_same_name_are_read_anew(tmp_path: Path, is_blend: bool) -> None:
    prefix, cache = write(tmp_path / "data"), tmp_path / "cache"
    other = write(tmp_path / "other", first=7)
    path: Any = [0.5, prefix, 0.5, other] if is_blend else prefix
    read(path, cache)
    write(prefix, documents=11, length=90, first=30)
    again = read(path, cache)
    assert torch.equal(again, read(path, tmp_path / "fresh"))
    assert set(files_of(tmp_path / "fresh")) <= set(files_of(cache))


def test_data_beside_which_the_cache_lies_are_read_anew(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    read(prefix, None)
    write(prefix, documents=11, length=90)
    assert torch.equal(read(prefix, None), read(prefix, tmp_path / "fresh"))
    assert len(list((tmp_path / "data" / "cache" / "GPTDataset_indices").iterdir())) == 8


def test_a_second_run_builds_nothing_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, cache = write(tmp_path / "data"), tmp_path / "cache"
    other = write(tmp_path / "other", first=7)
    path = [0.5, prefix, 0.5, other]
    first = read(path, cache)
    before = state_of(cache)
    assert len(before) == 2 * 4 + 3

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("an index was written")

    monkeypatch.setattr(np, "save", refuse)
    for suffix in (".bin", ".idx"):  # other times and places on the disk, the same data
        shutil.copy(f"{prefix}{suffix}", tmp_path / "copy")
        os.replace(tmp_path / "copy", f"{prefix}{suffix}")
    assert torch.equal(read(path, cache), first)
    assert state_of(cache) == before


def test_only_the_changed_data_set_of_a_blend_is_indexed_again(tmp_path: Path) -> None:
    paths, cache = [write(tmp_path / name) for name in ("one", "two")], tmp_path / "cache"
    read([0.5, paths[0], 0.5, paths[1]], cache)
    before = set(files_of(cache))
    write(paths[0], documents=31)
    read([0.5, paths[0], 0.5, paths[1]], cache)
    assert len(set(files_of(cache)) - before) == 4 + 3  # one data set and the blend


def fewer(path: Path) -> None:
    np.save(path, np.load(path)[:-3])


def zeroed(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:128] + bytes(len(content) - 128))


def out_of_range(path: Path) -> None:
    array = np.load(path)
    array[len(array) // 2] += 10**4
    np.save(path, array)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no bytes": lambda path: path.write_bytes(b""),
    "cut off in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "cut off after its header": lambda path: path.write_bytes(path.read_bytes()[:128]),
    "garbage": lambda path: path.write_bytes(b"garbage " * 30),
    "a pickle": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True),
    "floats": lambda path: np.save(path, np.load(path).astype(np.float32)),
    "fewer entries": fewer,
    "zeros": zeroed,
    "out of range": out_of_range,
}


@pytest.mark.parametrize("kind", [*GPT_KINDS, *BLEND_KINDS])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_built_again(damage: str, kind: str, tmp_path: Path, logged: list[str]) -> None:
    path = [0.3, write(tmp_path / "one"), 0.7, write(tmp_path / "two", first=7)]
    cache = tmp_path / "cache"
    whole = read(path, cache)
    before = files_of(cache)
    damaged = sorted(cache.glob(f"*-{kind}.npy"))[-1]
    DAMAGES[damage](damaged)
    assert torch.equal(read(path, cache), whole)
    assert files_of(cache) == before
    assert len(logged) == 1
    assert "damaged (" in logged[0]
    assert logged[0].endswith("built again")


@pytest.mark.parametrize("missing", [*GPT_KINDS, "description"])
def test_a_set_with_a_file_missing_is_built_again(missing: str, tmp_path: Path) -> None:
    prefix, cache = write(tmp_path / "data"), tmp_path / "cache"
    whole = read(prefix, cache)
    before = files_of(cache)
    next(cache.glob(f"*-{missing}.*")).unlink()
    assert torch.equal(read(prefix, cache), whole)
    assert files_of(cache) == before


@pytest.mark.parametrize("saved", [0, 1, 2])
def test_a_build_that_ends_early_leaves_no_file_of_the_set(
    saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, cache = write(tmp_path / "data"), tmp_path / "cache"
    seen: list[set[str]] = []

    def save(path: str, array: Any, **options: Any) -> None:
        seen.append({name.name for name in cache.iterdir() if name.is_file()})
        if len(seen) > saved:
            raise OSError(28, "No space left on device")
        original(path, array, **options)

    original = np.save
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.raises(ConfigError, match=f"cannot be kept in {cache}: No space left on device; give a"):
            read(prefix, cache)
    assert seen == [set()] * (saved + 1), "a killed program would have left files"
    assert list(cache.iterdir()) == []
    assert torch.equal(read(prefix, cache), read(prefix, tmp_path / "fresh"))


def test_the_identity_is_of_the_lengths_and_not_of_time_or_ids(tmp_path: Path) -> None:
    prefix = write(tmp_path / "data")
    first = data_identity(str(prefix))
    os.utime(f"{prefix}.idx", (1, 1))
    os.utime(f"{prefix}.bin", (1, 1))
    assert data_identity(str(prefix)) == first
    write(prefix, first=9)
    assert data_identity(str(prefix)) == first
    write(prefix, documents=29)
    assert data_identity(str(prefix)) != first


def test_two_shards_that_change_places_in_a_large_index_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.data.identity._BLOCK_BYTES", 64)
    monkeypatch.setattr("megatron_let.data.identity._MAX_BLOCKS", 16)
    shards = [[20 + (number * seed) % 7 for number in range(100)] for seed in (2, 3, 4, 5)]

    def identity(order: tuple[int, ...]) -> str:
        write_token_files(tmp_path / "data", [[1] * length for shard in order for length in shards[shard]])
        return data_identity(str(tmp_path / "data"))

    assert Path(f"{tmp_path / 'data'}.idx").exists() is False
    assert len({identity((0, 1, 2, 3)), identity((0, 2, 1, 3)), identity((0, 1, 2, 3))}) == 2
    assert Path(f"{tmp_path / 'data'}.idx").stat().st_size > 64 * 16


@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(30, 70)), min_size=1, max_size=12),
    samples=st.integers(1, 40),
    seed=st.integers(1, 1000),
)
@settings(max_examples=40, deadline=None)
def test_no_whole_index_is_taken_for_a_damaged_one(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], samples: int, seed: int
) -> None:
    directory = tmp_path_factory.mktemp("any")
    write_as_neox(directory / "data", [[[1] * length] for length in [*lengths, 40]], "uint16")
    path = [0.6, directory / "data", 0.4, directory / "data"]
    for paths in (path, directory / "data"):
        config = config_of(paths, split="1,0,0", seed=seed, data_cache_path=directory / "cache")
        build_datasets_alone(config, Tokenizer(), SampleCounts(samples, 0, 0))
        before = state_of(directory / "cache")
        build_datasets_alone(config, Tokenizer(), SampleCounts(samples, 0, 0))
        assert state_of(directory / "cache") == before
