"""`build_data_cache.py`: what it builds is what a run with the same flags takes, and it takes that alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import build_data_cache
import pytest

from megatron_let.log import LOGGER
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train, write_token_files

BASE = {"--train-iters": 2, "--eval-iters": 1}


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """Give the package's logger back as it was: the program sets it up."""
    handlers, level, propagate = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate
    yield
    LOGGER.handlers[:] = handlers
    LOGGER.setLevel(level)
    LOGGER.propagate = propagate


def write(prefix: Path, documents: int) -> Path:
    write_token_files(prefix, [[*range(39), 60] for _ in range(documents)])
    return prefix


def words_of(flags: dict[str, Any]) -> list[str]:
    return arguments(TINY_STUDENT, {**BASE, **flags})


def state_of(directory: Path) -> dict[str, tuple[int, int]]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def build(flags: dict[str, Any], *own: str) -> int:
    return build_data_cache.main([*words_of(flags), *own])


SOURCES: dict[str, tuple[dict[str, Any], int]] = {
    "one data set": ({"--data-path": ["a"], "--split": "2,1,1"}, 3 * 4),
    "blend by weight": ({"--data-path": [0.25, "a", 0.75, "b"], "--split": "2,1,1"}, 3 * (2 * 4 + 3)),
    "blend by size": ({"--data-path": ["a", "b"], "--split": "2,1,1"}, 3 * (2 * 4 + 3)),
    "one for each split": ({"--train-data-path": ["a", "b"], "--valid-data-path": ["b"]}, 2 * 4 + 3 + 4),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_with_the_same_flags_builds_nothing(
    source: str, tmp_path: Path, pool: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, files = SOURCES[source]
    places = {name: write(tmp_path / name, count) for name, count in (("a", 40), ("b", 80))}
    flags = {
        flag: [places.get(word, word) for word in words] if isinstance(words, list) else words
        for flag, words in flags.items()
    }
    flags["--data-cache-path"] = tmp_path / "cache"
    assert build(flags) == 0
    printed = capsys.readouterr()
    assert "training: 16 samples of 32 tokens\n" in printed.out
    assert "validation: 8 samples of 32 tokens\n" in printed.out
    assert f"cache: {tmp_path / 'cache'}\n" in printed.out
    before = state_of(tmp_path)
    assert len([name for name in before if name.startswith("cache/")]) == files
    for world_size in (1, 2):
        pool.run(world_size, train, words_of(flags))
    assert state_of(tmp_path) == before


def test_samples_and_epochs_of_each_data_set_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a", 10), write(tmp_path / "b", 100)
    flags = {"--data-path": [0.5, a, 0.5, b], "--split": "1,0,0", "--data-cache-path": tmp_path / "cache"}
    assert build({**flags, "--train-iters": 5, "--eval-iters": 0}) == 0
    assert capsys.readouterr().out.splitlines() == [
        "training: 40 samples of 32 tokens",
        f"  {a}: 20 samples, 1.60 epochs of 400 tokens",
        f"  {b}: 20 samples, 0.16 epochs of 4,000 tokens",
        "validation: no samples",
        "test: no samples",
        f"cache: {tmp_path / 'cache'}",
    ]


def test_a_layout_of_many_ranks_and_kernels_that_are_not_here_are_no_hindrance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a", 40)
    layout = {"--tensor-model-parallel-size": 2, "--pipeline-model-parallel-size": 2, "--bf16": None}
    flags = {"--data-path": a, **layout, "--transformer-impl": "transformer_engine", "--split": "1,0,0"}
    flags["--eval-iters"] = 0
    assert build(flags) == 0
    assert f"cache: {a}/cache/GPTDataset_indices" in capsys.readouterr().out
    assert build({**flags, "--global-batch-size": False}) == 2
    assert "give --world-size too" in capsys.readouterr().err
    assert build({**flags, "--global-batch-size": False}, "--world-size", "16") == 0
    assert "training: 8 samples" in capsys.readouterr().out  # 2 iterations of 4 replicas


def test_a_blend_without_a_cache_directory_gets_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / "a", 40), write(tmp_path / "b", 40)]
    assert build({"--data-path": paths, "--split": "1,0,0", "--eval-iters": 0}) == 0
    assert "the order of a blend is not kept" in capsys.readouterr().err


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "mock data": ({"--data-path": False, "--mock-data": None}, (), "--mock-data needs no cache"),
    "no data": ({"--data-path": "/nowhere/a"}, (), "has no a.idx and no a.bin"),
    "unknown flag": ({"--data-paht": "a"}, (), "unknown flag --data-paht"),
    "no ranks": ({}, ("--world-size", "0"), "--world-size 0: a run has at least one rank"),
    "no number": ({}, ("--world-size", "x"), "invalid int value: 'x'"),
    "too few tokens": ({"--split": "1,999,0"}, (), "the training share of data set"),
    "no place": ({"--data-cache-path": "/proc/nowhere"}, (), "cannot be kept in /proc/nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_two(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, own, message = MISTAKES[mistake]
    assert build({"--data-path": write(tmp_path / "a", 40), **flags}, *own) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("warning:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert captured.out == ""
