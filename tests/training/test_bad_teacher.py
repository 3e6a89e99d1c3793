"""Teachers that cannot be used: refused by every rank, also when only the stage that owns layer k sees why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train
from megatron_let.testing.training import refusal as train_refusal
from megatron_let.training.let_record import teacher_identity
from megatron_let.training.teachers import teacher_files
from tests.training.bad_input import refusal, run, write_manifest_for, write_word_tokenizer

WORDS = [f"w{index}" for index in range(60)] + ["<eod>"]
ON_LAST_STAGE = {"--pipeline-model-parallel-size": 2, "--let-student-layer": 3}


@pytest.fixture
def words(token_files: Path) -> dict[str, Any]:
    """Return settings of a run of one iteration on two pipeline stages, the second of which owns layer k."""
    return {"--data-path": token_files, "--train-iters": 1, "--let-stop-iters": 1, **ON_LAST_STAGE}


@pytest.fixture
def damaged(teacher: Path, tmp_path: Path) -> Path:
    """Return a copy of the teacher that a test may damage."""
    return Path(shutil.copytree(teacher, tmp_path / "teacher"))


def test_the_teacher_that_is_damaged_here_is_good(
    words: dict[str, Any], teacher: Path, pool: RankPool
) -> None:
    assert run(pool, {**words, "--let-teacher-load": teacher}).code == 0


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def drop_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "has a damaged or cut-off model.safetensors"),
    "not finite": (spoil_weight, "gives states that are not finite"),
    "a weight missing": (drop_weight, "lacks 1 of the model's weights"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "holds no weights"),
    "not a model's config": (
        lambda directory: (directory / "config.json").write_text("{}"),
        "has a config.json that transformers cannot use",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_that_only_the_owner_stage_sees(
    damage: str, damaged: Path, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    spoil, expected = DAMAGES[damage]
    spoil(damaged)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"iteration": 3}\n')
    changes = {**words, "--let-teacher-load": damaged, "--save": tmp_path / "run"}
    message = refusal(pool, changes, untouched=tmp_path)
    assert expected in message
    assert str(damaged) in message


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nowhere": (
        lambda root: root / "nowhere",
        "does not exist; give the directory of a Hugging Face model (downloaded before) or",
    ),
    "too long": (lambda root: root / ("x" * 256), "does not exist"),
    "a file": (lambda root: root / "teacher" / "config.json", "is not a directory"),
    "no model": (lambda root: root / "empty", "holds neither a config.json (Hugging Face) nor a latest_"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_is_no_teacher(place: str, damaged: Path, words: dict[str, Any], pool: RankPool) -> None:
    where, expected = PLACES[place]
    (damaged.parent / "empty").mkdir()
    path = where(damaged.parent)
    message = refusal(pool, {**words, "--let-teacher-load": path})
    assert f"--let-teacher-load {path} " in message
    assert expected in message


def test_a_teacher_of_another_form_than_said(
    words: dict[str, Any], teacher: Path, start: Path, pool: RankPool
) -> None:
    as_megatron = {**words, "--let-teacher-load": teacher, "--let-teacher-format": "megatron"}
    assert f"{teacher} holds no checkpoint" in refusal(pool, as_megatron)
    as_hugging_face = {**words, "--let-teacher-load": start, "--let-teacher-format": "hf"}
    assert f"{start} is not a Hugging Face model" in refusal(pool, as_hugging_face)


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_layer_beyond_the_teachers_last(
    kind: str, words: dict[str, Any], teacher: Path, start: Path, pool: RankPool
) -> None:
    path, last = (teacher, 3) if kind == "hf" else (start, 4)
    changes = {**words, "--let-teacher-load": path, "--let-teacher-layer": last + 1}
    message = refusal(pool, changes)
    assert f"--let-teacher-layer {last + 1}: the teacher in {path}" in message
    assert f"has layers 1 to {last}" in message


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_vocabulary_smaller_than_the_students(
    kind: str, words: dict[str, Any], teacher: Path, start: Path, pool: RankPool
) -> None:
    path, last = (teacher, 66) if kind == "hf" else (start, 60)
    message = refusal(pool, {**words, "--let-teacher-load": path, "--vocab-size": 67})
    assert "the student's token ids reach 67 but teacher" in message
    assert f"knows ids up to {last}" in message
    if kind == "hf":  # 66 and the end of document: just as many as the teacher's 67
        assert run(pool, {**words, "--let-teacher-load": path, "--vocab-size": 66}).code == 0


def test_a_teacher_directory_with_another_tokenizer(
    damaged: Path, token_files: Path, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    write_word_tokenizer(tmp_path / "mine", WORDS)
    write_word_tokenizer(damaged, [WORDS[1], WORDS[0], *WORDS[2:]])
    changes = {
        **words,
        "--let-teacher-load": damaged,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": tmp_path / "mine",
        "--vocab-size": False,
    }
    message = refusal(pool, changes)
    assert "the student's data and the teacher use different tokenizers" in message
    assert str(damaged) in message
    assert str(tmp_path / "mine") in message
    write_word_tokenizer(damaged, WORDS)
    assert run(pool, changes).code == 0
    # what cannot be compared is said, once
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (damaged / name).unlink()
    result = run(pool, changes)
    warnings = [line for line in result.lines if "cannot be compared by tokenizer" in line]
    assert (result.code, len(warnings)) == (0, 1)


def test_a_megatron_teacher_trained_with_another_tokenizer(
    token_files: Path, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    prefix = tmp_path / "tokens"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{token_files}{suffix}", f"{prefix}{suffix}")
    tokenizers = {"usual": WORDS, "swapped": [WORDS[1], WORDS[0], *WORDS[2:]]}
    for name, order in tokenizers.items():
        write_word_tokenizer(tmp_path / name, order)
    base: dict[str, Any] = {"--tokenizer-type": "HuggingFaceTokenizer", "--vocab-size": False}
    base["--train-iters"] = 1
    for name in tokenizers:
        write_manifest_for(prefix, tmp_path / name)
        own = {"--tokenizer-model": tmp_path / name, "--save": tmp_path / f"by_{name}"}
        pool.run(1, train, arguments(TINY_STUDENT, {**base, "--data-path": prefix, **own}))
    flags = {**words, **base, "--data-path": prefix, "--tokenizer-model": tmp_path / "swapped"}
    message = refusal(pool, {**flags, "--let-teacher-load": tmp_path / "by_usual"})
    assert "use different tokenizers" in message
    assert str(tmp_path / "by_usual") in message
    assert run(pool, {**flags, "--let-teacher-load": tmp_path / "by_swapped"}).code == 0


def damage_newest(root: Path, name: str, spoil: Callable[[Path], object]) -> None:
    spoil(root / "iter_0000002" / name)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [("__0_0.distcp", flip), ("__0_0.distcp", Path.unlink), (".metadata", Path.unlink), ("common.pt", Path.unlink)],
)  # fmt: skip
def test_a_damaged_megatron_teacher(
    name: str,
    spoil: Callable[[Path], object],
    start: Path,
    words: dict[str, Any],
    pool: RankPool,
    tmp_path: Path,
) -> None:
    root = Path(shutil.copytree(start, tmp_path / "teacher"))
    damage_newest(root, name, spoil)
    message = refusal(pool, {**words, "--let-teacher-load": root})
    assert f"checkpoint {root / 'iter_0000002'}" in message
    assert name in message


def test_a_megatron_teacher_whose_weights_are_not_finite(
    start: Path, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    changes = {"--data-path": words["--data-path"], "--train-iters": 1, "--lr": 1e30, "--min-lr": 1e30}
    changes.update(
        {"--clip-grad": 0, "--no-check-for-nan-in-loss-and-grad": None, "--lr-decay-style": "constant"}
    )
    diverged = {**changes, "--save": tmp_path / "diverged", "--init-method-std": 1e20}
    pool.run(1, train, arguments(TINY_STUDENT, diverged))
    message = refusal(pool, {**words, "--let-teacher-load": tmp_path / "diverged"})
    assert "gives states that are not finite in torch.float32" in message


def test_one_checkpoint_instead_of_the_directory_above_it(
    start: Path, words: dict[str, Any], pool: RankPool
) -> None:
    message = refusal(pool, {**words, "--let-teacher-load": start / "iter_0000002"})
    assert message.endswith(f"it looks like one checkpoint: give the directory above it, {start}")


def test_the_teachers_directory_as_the_save_directory(
    damaged: Path, start: Path, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(damaged)
    for save, path in ((damaged, damaged), (tmp_path / "link", damaged), (start, start)):
        message = refusal(pool, {**words, "--let-teacher-load": path, "--save": save}, untouched=path)
        assert message == f"--save {save} is the teacher's directory; give the run a directory of its own"


def test_a_megatron_teacher_is_known_by_its_weights(start: Path, pool: RankPool, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(start, tmp_path / "copy"))
    files = [teacher_files(path) for path in (start, copy)]
    assert files == [start / "iter_0000002", copy / "iter_0000002"]
    (copy / "exit_status.json").write_text("{}")
    before = [teacher_identity(path) for path in files if path is not None]
    assert before[0] == before[1]
    flip(copy / "iter_0000002" / "__0_0.distcp")
    assert teacher_identity(copy / "iter_0000002") != before[0]
    assert teacher_files(tmp_path / "nowhere") is None


def test_another_megatron_teacher_is_refused_on_resume(
    start: Path, token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    other = {"--data-path": token_files, "--train-iters": 2, "--seed": 7, "--save": tmp_path / "other"}
    pool.run(1, train, arguments(TINY_STUDENT, other))
    words = {"--data-path": token_files, "--let-stop-iters": 4, "--let-teacher-load": start}
    own = {**words, "--save": tmp_path / "run", "--load": tmp_path / "run"}
    pool.run(1, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 1}))
    message = refusal(pool, {**own, "--let-teacher-load": tmp_path / "other"}, untouched=tmp_path)
    assert "teacher identity is" in message


def test_remote_code_is_not_run(damaged: Path, words: dict[str, Any], pool: RankPool) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config.update(model_type="own-kind", auto_map={"AutoConfig": "own_code.OwnConfig"})
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "own_code.py").write_text("raise SystemExit('was run')\n")
    message = refusal(pool, {**words, "--let-teacher-load": damaged})
    assert "--let-trust-remote-code" in message


def test_the_dtype_that_overflows_is_named(damaged: Path, words: dict[str, Any], pool: RankPool) -> None:
    weights = load_file(damaged / "model.safetensors")
    weights["model.embed_tokens.weight"] = torch.full_like(weights["model.embed_tokens.weight"], 1e6)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    message = refusal(pool, {**words, "--let-teacher-load": damaged, "--let-teacher-dtype": "fp16"})
    assert "torch.float16" in message


def refused_early(argv: list[str]) -> str | None:
    """Return the refusal of a run that cannot build a model."""
    with patch("megatron_let.training.build.build_student", side_effect=AssertionError("a model was built")):
        return train_refusal(argv)


@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize("mistake", ["layer", "vocabulary", "weights"])
def test_what_can_be_seen_in_the_teachers_files_is_found_before_anything_is_built(
    mistake: str, kind: str, damaged: Path, start: Path, words: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    path = damaged if kind == "hf" else Path(shutil.copytree(start, tmp_path / "copy"))
    if mistake == "weights" and kind == "hf":
        truncate(path)
    elif mistake == "weights":
        damage_newest(path, "__0_0.distcp", flip)
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "layer": ({"--let-teacher-layer": 9}, "has layers 1 to"),
        "vocabulary": ({"--vocab-size": 200}, "token ids reach 200"),
        "weights": ({}, "damaged"),
    }
    flags, expected = cases[mistake]
    argv = arguments(TINY_STUDENT, {**words, "--let-teacher-load": path, **flags})
    for message in pool.run(2, refused_early, argv):
        assert expected in str(message)


def test_mock_data_is_named_once_beside_a_teacher(damaged: Path, pool: RankPool, tmp_path: Path) -> None:
    """There is no data set to compare; student and teacher are, and agree."""
    write_word_tokenizer(damaged, WORDS)
    changes = {
        "--mock-data": None,
        "--train-iters": 1,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": damaged,
        "--vocab-size": False,
    }
    for teacher, expected in (({"--let-teacher-load": damaged, "--let-stop-iters": 1}, 1), ({}, 0)):
        result = run(pool, {**changes, **teacher})
        warnings = [line for line in result.lines if line.startswith("WARNING") and "own loss" not in line]
        assert (result.code, len(warnings)) == (0, expected)
        assert all("mock data was made with no tokenizer" in line for line in warnings)
