"""Which bos a teacher reads first: its tokenizer's, if that puts one before a text or the flag asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_let.errors import ConfigError
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.testing.training import TINY_STUDENT, arguments, train, training_rows, write_token_files
from megatron_let.training.teacher_bos import bos_of_directory
from tests.training.bad_input import write_word_tokenizer

WORDS = [f"w{index}" for index in range(60)] + ["<bos>", "<eod>"]
BOS = WORDS.index("<bos>")


def _write_tokenizer(directory: Path, *, names_bos: bool = True, prepends: bool = False) -> Path:
    write_word_tokenizer(directory, WORDS)
    if prepends:
        path = directory / "tokenizer.json"
        content: dict[str, Any] = json.loads(path.read_text())
        single: list[Any] = [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        special = {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        }
        path.write_text(json.dumps(content))
    if names_bos:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<bos>"}))
    return directory


def test_auto_does_what_the_tokenizer_does(tmp_path: Path) -> None:
    assert bos_of_directory(_write_tokenizer(tmp_path / "prepends", prepends=True), "auto") == BOS
    assert bos_of_directory(_write_tokenizer(tmp_path / "names"), "auto") is None
    assert bos_of_directory(_write_tokenizer(tmp_path / "none", names_bos=False), "auto") is None
    assert bos_of_directory(tmp_path, "auto") is None  # no tokenizer
    assert bos_of_directory(None, "auto") is None


def test_the_flag_decides_otherwise(tmp_path: Path) -> None:
    assert bos_of_directory(_write_tokenizer(tmp_path / "prepends", prepends=True), "off") is None
    assert bos_of_directory(_write_tokenizer(tmp_path / "names"), "on") == BOS
    without = _write_tokenizer(tmp_path / "none", names_bos=False)
    for path in (without, None):
        with pytest.raises(
            ConfigError, match=r"--let-teacher-bos on: .* holds no tokenizer with a bos token"
        ):
            bos_of_directory(path, "on")


def test_a_run_shows_its_teacher_the_bos_on_every_layout_and_says_so(pool: RankPool, tmp_path: Path) -> None:
    teacher = _write_tokenizer(tmp_path / "teacher", prepends=True)
    write_tiny_teacher("llama", teacher)
    write_token_files(tmp_path / "tokens", [[token % 60 for token in range(7, 50)]] * 40)
    base = {
        "--data-path": tmp_path / "tokens",
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": teacher,
        "--vocab-size": False,
        "--let-teacher-load": teacher,
        "--let-stop-iters": 2,
        "--train-iters": 2,
        "--eval-iters": 0,
    }
    # Both from the same weights, with every document a segment of its own.
    again = {"--load": tmp_path / "auto", "--finetune": None, "--reset-attention-mask": None}
    split = {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "auto": (1, {}),
        "on": (1, {"--let-teacher-bos": "on"}),
        "off": (1, {"--let-teacher-bos": "off"}),
        "whole": (1, again),
        "split": (2, {**again, **split}),
    }
    losses = {}
    for name, (world_size, changes) in layouts.items():
        save = tmp_path / name
        pool.run(world_size, train, arguments(TINY_STUDENT, {**base, **changes, "--save": save}))
        losses[name] = [row["let_loss"] for row in training_rows(save)]
    assert losses["auto"] == losses["on"]
    assert losses["auto"] != losses["off"]
    assert losses["split"] == pytest.approx(losses["whole"], rel=1e-5)  # fp32 sums in another order
    settings = (tmp_path / "auto" / "iter_0000002" / "settings.yaml").read_text()
    assert f"bos {BOS} before each segment" in settings
    assert "before each segment" not in (tmp_path / "off" / "iter_0000002" / "settings.yaml").read_text()
