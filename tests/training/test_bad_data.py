"""Data that cannot be trained on: found by rank 0, refused by every rank in one line, before the model is built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import write_token_files
from tests.training.bad_input import refusal, run, write_manifest_for, write_word_tokenizer

WORDS = [f"w{index}" for index in range(60)] + ["<eod>"]
SHORT = {"--train-iters": 1, "--eval-iters": 0}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return directories of two tokenizers of the same size that differ in the order of two words."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_word_tokenizer(root / "usual", WORDS)
    write_word_tokenizer(root / "swapped", [WORDS[1], WORDS[0], *WORDS[2:]])
    return {name: root / name for name in ("usual", "swapped")}


@pytest.fixture
def prefix(token_files: Path, tmp_path: Path) -> Path:
    """Return the prefix of a copy of the data set that a test may damage."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{token_files}{suffix}", tmp_path / f"tokens{suffix}")
    return tmp_path / "tokens"


def cut(path: str, by: int) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) - by])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no .bin": (lambda prefix: Path(f"{prefix}.bin").unlink(), "has no tokens.bin: both files are needed"),
    "no .idx": (lambda prefix: Path(f"{prefix}.idx").unlink(), "has no tokens.idx: both files are needed"),
    ".bin cut off": (lambda prefix: cut(f"{prefix}.bin", 2), "one of them is cut off"),
    ".idx cut off": (lambda prefix: cut(f"{prefix}.idx", 8), "tokens.idx is cut off"),
    ".idx of something else": (
        lambda prefix: Path(f"{prefix}.idx").write_bytes(b"x" * 100),
        "tokens.idx is not a Megatron index",
    ),
    "empty": (lambda prefix: write_token_files(prefix, []), "the data set is empty"),
    "manifest torn": (
        lambda prefix: Path(f"{prefix}.manifest.json").write_text('{"version": 1, "tok'),
        "cannot read the manifest",
    ),
    "manifest of other files": (
        lambda prefix: write_manifest_for(prefix, None, tokens=5),
        "belongs to other files: it states tokens 5",
    ),
    "manifest without its numbers": (
        lambda prefix: write_manifest_for(prefix, None, max_token_id=None),
        "is damaged: no proper max_token_id",
    ),
    "manifest with a list as fingerprint": (
        lambda prefix: write_manifest_for(prefix, None, tokenizer_fingerprint=["a"]),
        "is damaged: no proper tokenizer_fingerprint",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_set(damage: str, prefix: Path, pool: RankPool) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(prefix)
    message = refusal(pool, {**SHORT, "--data-path": prefix}, untouched=prefix.parent)
    assert expected in message
    assert str(prefix) in message


def test_a_data_set_given_by_the_name_of_one_of_its_files(prefix: Path, pool: RankPool) -> None:
    assert "give its path without .bin" in refusal(pool, {**SHORT, "--data-path": f"{prefix}.bin"})


def test_a_path_longer_than_the_system_takes(tmp_path: Path, pool: RankPool) -> None:
    long = tmp_path / ("x" * 256)
    assert "File name too long" in refusal(pool, {**SHORT, "--data-path": long})
    changes = {
        **SHORT,
        "--mock-data": None,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--vocab-size": False,
    }
    assert "tokenizer" in refusal(pool, {**changes, "--tokenizer-model": long})
    assert "File name too long" in refusal(pool, {**SHORT, "--mock-data": None, "--save": long})


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "no manifest"])
def test_a_token_id_at_the_vocabulary_size(with_manifest: bool, tmp_path: Path, pool: RankPool) -> None:
    prefix = tmp_path / "tokens"
    write_token_files(prefix, [[1, 2, 61, 60]] * 50)
    if with_manifest:
        write_manifest_for(prefix, None, max_token_id=61)
    message = refusal(pool, {**SHORT, "--data-path": prefix})
    assert f"data set {prefix} holds token id 61, but tokenizer 60 has 61 ids (0 to 60)" in message
    result = run(pool, {**SHORT, "--data-path": prefix, "--vocab-size": 61}, world_size=1)
    assert result.code == 0


def test_data_made_with_another_tokenizer(prefix: Path, tokenizers: dict[str, Path], pool: RankPool) -> None:
    write_manifest_for(prefix, tokenizers["usual"])
    words = {
        **SHORT,
        "--data-path": prefix,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--vocab-size": False,
    }
    message = refusal(pool, {**words, "--tokenizer-model": tokenizers["swapped"]})
    assert f"were made with {tokenizers['usual']}" in message
    assert "other ids: 2 (first 'w1': 0 and 1) (the one given first)" in message
    assert f"not with {tokenizers['swapped']}" in message
    result = run(pool, {**words, "--tokenizer-model": tokenizers["usual"]}, world_size=1)
    assert (result.code, [line for line in result.lines if line.startswith("WARNING")]) == (0, [])


def test_a_tokenizer_that_is_not_there(prefix: Path, tmp_path: Path, pool: RankPool) -> None:
    words = {
        **SHORT,
        "--data-path": prefix,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--vocab-size": False,
    }
    assert "no tokenizer in directory" in refusal(pool, {**words, "--tokenizer-model": tmp_path})
    assert "is a file" in refusal(pool, {**words, "--tokenizer-model": f"{prefix}.bin"})


def few_documents(root: Path, count: int) -> Path:
    random = np.random.default_rng(3)
    prefix = root / f"few_{count}"
    write_token_files(prefix, [random.integers(0, 60, 40).tolist() for _ in range(count)])
    return prefix


EMPTY_SPLITS: dict[str, tuple[dict[str, Any], str]] = {
    "training": ({"--split": "1,999,0"}, "the training share of data set"),
    "validation": ({"--eval-iters": 1}, "the validation share of data set"),
    "validation at intervals": (
        {"--eval-iters": 1, "--eval-interval": 1},
        "--eval-interval --eval-iters asks",
    ),
    "no share": ({"--eval-iters": 1, "--split": "1,0,0"}, "there is no validation data (--split 1,0,0)"),
}


@pytest.mark.parametrize("case", EMPTY_SPLITS)
def test_a_split_without_a_document(case: str, tmp_path: Path, pool: RankPool) -> None:
    changes, expected = EMPTY_SPLITS[case]
    prefix = few_documents(tmp_path, 10)  # 30 in 1,000 of 10 documents is none
    assert expected in refusal(pool, {**SHORT, "--data-path": prefix, **changes})


def test_validation_that_nobody_asked_for_is_left_out_with_a_warning(tmp_path: Path, pool: RankPool) -> None:
    prefix = few_documents(tmp_path, 10)
    result = run(pool, {"--train-iters": 1, "--data-path": prefix, "--eval-iters": False})
    assert result.code == 0
    assert sum("there will be no validation" in line for line in result.lines) == 1
    assert sum("there will be no test" in line for line in result.lines) == 1
    assert not any("validation loss" in line for line in result.lines)


def test_a_split_switched_off_by_a_share_of_0_is_no_matter_for_a_warning(
    tmp_path: Path, pool: RankPool
) -> None:
    prefix = few_documents(tmp_path, 10)
    result = run(
        pool,
        {"--train-iters": 1, "--data-path": prefix, "--eval-iters": False, "--split": "1,0,0"},
        world_size=1,
    )
    assert result.code == 0
    assert not any("there will be no" in line for line in result.lines)


def test_paths_for_each_split(tmp_path: Path, pool: RankPool) -> None:
    prefix = few_documents(tmp_path, 10)
    words = {**SHORT, "--train-data-path": prefix, "--eval-iters": 1}
    assert "there is no validation data (no --valid-data-path)" in refusal(pool, words)
    result = run(pool, {**words, "--valid-data-path": prefix})
    assert result.code == 0
    assert any("validation loss" in line for line in result.lines)


def test_a_blend_by_size_that_holds_too_few_samples(tmp_path: Path, pool: RankPool) -> None:
    paths = [few_documents(tmp_path, 10), few_documents(tmp_path, 20)]  # 400 and 800 tokens: 37 samples of 32
    words = {**SHORT, "--data-path": paths, "--split": "1,0,0"}
    assert "hold 36 samples of 32 tokens (--split 1,0,0), and 40 are needed" in refusal(
        pool, {**words, "--train-iters": 5}
    )
    assert run(pool, {**words, "--train-iters": 4}, world_size=1).code == 0
    weighted = {**words, "--data-path": [0.5, paths[0], 0.5, paths[1]], "--train-iters": 10}
    assert run(pool, weighted).code == 0


def test_a_data_set_of_a_blend_by_size_that_fills_no_sample(tmp_path: Path, pool: RankPool) -> None:
    write_token_files(tmp_path / "tiny", [[1, 2, 3]])
    paths = [few_documents(tmp_path, 30), tmp_path / "tiny"]
    message = refusal(pool, {**SHORT, "--data-path": paths, "--split": "1,0,0"})
    assert f"data set {tmp_path / 'tiny'} holds 3 tokens (--split 1,0,0), less than one sample" in message


def test_an_index_cache_that_cannot_be_written(prefix: Path, pool: RankPool) -> None:
    for place in (f"{prefix}.bin", "/proc/nowhere"):
        message = refusal(pool, {**SHORT, "--data-path": prefix, "--data-cache-path": place})
        assert f"cannot be kept in {place}" in message
        assert "--data-cache-path" in message
