"""Settings that cannot work, from the command line to the rules: one line that names what was given, before any rank
meets another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_let import optional
from megatron_let.config.derive import resolve
from megatron_let.errors import ConfigError
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments, save_directory_of
from tests.training.bad_input import assert_readable

TEACHER = {"--let-teacher-load": "teacher"}
NO_FLAG: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def nothing_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no optional package be installed, whatever is on this machine."""
    for name in ("transformer_engine", "apex", "tensorboard", "wandb"):
        monkeypatch.setattr(optional, f"has_{name}", lambda: False)


def message_of(changes: Mapping[str, Any], world_size: int = 1) -> str:
    """Return the line with which the tiny student with `changes` is refused on so many ranks."""
    words = arguments(TINY_STUDENT, {"--mock-data": None, **changes})
    with pytest.raises(ConfigError) as caught:
        resolve(parse_arguments(words), world_size)
    assert_readable(str(caught.value))
    return str(caught.value)


def test_the_settings_that_are_broken_here_are_good() -> None:
    resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None})), 1)
    resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None, **TEACHER})), 1)


LAYOUTS = {
    "heads": ({"--tensor-model-parallel-size": 3}, 3, "--num-attention-heads 4 is not a multiple of"),
    "layers": ({"--pipeline-model-parallel-size": 3}, 3, "--num-layers 4 is not a multiple of"),
    "ranks": ({"--tensor-model-parallel-size": 2}, 3, "3 ranks cannot hold whole replicas"),
    "batch": (NO_FLAG, 3, "--global-batch-size 8 is not a multiple of micro batch 1 x data-parallel size 3"),
    "micro above global": ({"--micro-batch-size": 16}, 1, "--global-batch-size 8 is not a multiple of micro batch 16"),
    "positions": ({"--max-position-embeddings": 16}, 1, "--seq-length 32 is longer than --max-position-embeddings 16"),
    "context parallel": ({"--context-parallel-size": 2}, 2, "--context-parallel-size 2 needs Transformer Engine"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_does_not_divide(case: str) -> None:
    changes, world_size, expected = LAYOUTS[case]
    assert expected in message_of(changes, world_size)


LET = [
    ({**TEACHER, "--let-student-layer": 0}, "--let-student-layer is 1 or more, got 0"),
    ({**TEACHER, "--let-student-layer": 5}, "--let-student-layer is between 1 and --num-layers 4, got 5"),
    ({**TEACHER, "--let-teacher-layer": 0}, "--let-teacher-layer is 1 or more, got 0"),
    ({**TEACHER, "--let-stop-iters": 0}, "--let-stop-iters is 1 or more, got 0"),
    ({**TEACHER, "--let-stop-iters": 6}, "--let-stop-iters is between 1 and the run's 5 iterations, got 6"),
    ({**TEACHER, "--let-stop-fraction": 0}, "--let-stop-fraction is above 0 and at most 1"),
    ({**TEACHER, "--let-stop-fraction": 1.5}, "--let-stop-fraction is between 0 and 1, got 1.5"),
    ({**TEACHER, "--let-weight": -1}, "--let-weight is 0 or more, got -1"),
    ({**TEACHER, "--let-weight": "nan"}, "--let-weight takes a number, got 'nan'"),
    ({**TEACHER, "--let-control": "random-teacher"}, "--let-control random-teacher comes in a later version"),
    ({**TEACHER, "--let-share-teacher": "tensor"}, "--let-share-teacher tensor comes in a later version"),
    ({**TEACHER, "--let-loss": "cca"}, "--let-loss cca comes in a later version"),
    ({**TEACHER, "--let-loss": "logsum"}, "--let-loss logsum comes in a later version"),
    ({**TEACHER, "--let-projection": "linear"}, "--let-projection linear comes in a later version"),
    ({**TEACHER, "--objective": "rkd"}, "--objective rkd comes in a later version"),
    ({"--let-weight": 0.3}, "--let-weight cannot take effect without --let-teacher-load"),
    ({"--let-student-layer": 2}, "--let-student-layer cannot take effect without --let-teacher-load"),
    ({"--let-stop-iters": 2}, "--let-stop-iters cannot take effect without --let-teacher-load"),
    ({"--let-teacher-layer": 2}, "--let-teacher-layer cannot take effect without --let-teacher-load"),
    ({"--let-teacher-dtype": "fp32"}, "--let-teacher-dtype cannot take effect without --let-teacher-load"),
]


@pytest.mark.parametrize(("changes", "expected"), LET)
def test_let_settings_that_cannot_work(changes: dict[str, Any], expected: str) -> None:
    assert expected in message_of(changes)


KERNELS = [
    {"--bf16": None, "--fp8-format": "hybrid"},
    {"--transformer-impl": "transformer_engine"},
    {"--attention-backend": "flash"},
    {"--use-flash-attn": None},
    {"--masked-softmax-fusion": None},
    {"--gradient-accumulation-fusion": None},
    {"--rope-fusion": None},
    {"--persist-layer-norm": None},
]


@pytest.mark.parametrize("changes", KERNELS, ids=lambda changes: list(changes)[-1])
def test_a_kernel_asked_for_by_name_and_absent(changes: dict[str, Any]) -> None:
    message = message_of(changes)
    assert "installed" in message
    assert "Transformer Engine" in message


def test_a_flag_that_would_train_in_bf16_without_a_word_without_its_package() -> None:
    assert "--fp8-recipe cannot take effect without --fp8-format" in message_of(
        {"--fp8-recipe": "tensorwise"}
    )


@pytest.mark.parametrize("flag", ["--tensorboard-dir", "--wandb-project"])
def test_a_log_whose_package_is_absent(flag: str) -> None:
    assert f"{flag} needs the package" in message_of({flag: "runs"})


NUMBERS = [
    ({"--train-iters": 0}, "--train-iters is 1 or more, got 0"),
    ({"--train-iters": -5}, "--train-iters is 1 or more, got -5"),
    ({"--eval-interval": 0}, "--eval-interval is 1 or more, got 0"),
    ({"--save-interval": -1}, "--save-interval is 1 or more, got -1"),
    ({"--global-batch-size": -8}, "--global-batch-size is 1 or more, got -8"),
    ({"--seed": -1}, "--seed is 0 or more, got -1"),
    ({"--seed": 2**32}, "--seed is at most 2147483647, got 4294967296"),
    ({"--distributed-timeout-minutes": 10**12}, "--distributed-timeout-minutes is at most 525600"),
    ({"--num-layers": "four"}, "--num-layers takes a whole number, got 'four'"),
    ({"--lr": "inf"}, "--lr takes a number, got 'inf'"),
    ({"--save": ""}, "--save takes text, got ''; is a shell variable unset?"),
    ({"--load": " "}, "--load takes text, got ' '"),
    ({"--data-path": False, "--mock-data": False}, "give one source of data"),
    ({"--save": "runs/\udcff"}, "--save 'runs/\\udcff' is not UTF-8 text; rename the path"),
]


@pytest.mark.parametrize(("changes", "expected"), NUMBERS)
def test_values_of_the_wrong_kind_or_size(changes: dict[str, Any], expected: str) -> None:
    assert expected in message_of(changes)


def test_a_path_that_is_not_ascii_is_fine() -> None:
    words = arguments(TINY_STUDENT, {"--mock-data": None, "--save": "läufe/日本"})
    assert parse_arguments(words).checkpoint.save == "läufe/日本"


SOURCES = [
    (["a", "0.5", "b", "0.5"], "--data-path is one or more prefixes, or WEIGHT PREFIX"),
    (["0.5", "a", "0.5"], "--data-path is one or more prefixes, or WEIGHT PREFIX"),
    (["0", "a", "1", "b"], "--data-path needs weights above 0, got 0 1"),
    (["-1", "a", "1", "b"], "--data-path needs weights above 0, got -1 1"),
    (["inf", "a", "1", "b"], "--data-path needs weights above 0, got inf 1"),
    (["nan", "a", "1", "b"], "--data-path needs weights above 0, got nan 1"),
]


@pytest.mark.parametrize(("words", "expected"), SOURCES)
def test_a_malformed_blend(words: list[str], expected: str) -> None:
    assert expected in message_of({"--mock-data": False, "--data-path": words})


@pytest.mark.parametrize("split", ["0.9.9,1", "90;10", "0,1,0", "1,1,1,1", "-9,1", "all", "9e1,1", "."])
def test_a_malformed_split(split: str) -> None:
    expected = (
        f"--split is up to three shares for training, validation and test such as 969,30,1, got {split}"
    )
    assert expected in message_of({"--split": split})


@pytest.mark.parametrize("split", ["1", "99,1,0", "'98,1,1'", "0.9, 0.1", "90/5/5", ".9,.1,0."])
def test_a_split_that_megatron_reads_is_read(split: str) -> None:
    resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None, "--split": split})), 1)


UNKNOWN = [
    (["--num-layer", "4"], "unknown flag --num-layer; did you mean --num-layers?"),
    (["--let-wieght", "1"], "unknown flag --let-wieght; did you mean --let-weight?"),
    (["--num-experts", "8"], "--num-experts is not supported"),
    (["4"], "'4' belongs to no flag"),
]


@pytest.mark.parametrize(("words", "expected"), UNKNOWN)
def test_a_word_that_is_no_setting(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*words, "--mock-data"])
    assert expected in str(caught.value)


FILES = [
    ("num-layer: 4\n", "unknown name num-layer in the config file; did you mean num_layers?"),
    ("num-layers: four\n", "num-layers in the config file takes a whole number, got 'four'"),
    ("save: ''\n", "save takes text, got ''"),
    ("num-layers: [\n", "is not YAML"),
    ("just text\n", "must hold lines of the form name: value"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_a_config_file_with_a_mistake(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert expected in message_of({"--config": tmp_path / "run.yaml"})


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary", tmp_path / ("x" * 300)):
        message = message_of({"--config": path})
        assert f"--config {path} cannot be read" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--save runs/a --num-layer 4", "runs/a"),
        ("--save=runs/a --bogus", "runs/a"),
        ("--save runs/a --save runs/b", "runs/b"),
        ("--save runs/a --help", None),
        ("--save --bogus", None),
        ("--save a b", None),
        ("bogus --save runs/a", None),
        ("--config nowhere.yaml", None),
        ("--bogus", None),
    ],
)
def test_the_save_directory_is_made_out_of_a_command_line_that_is_wrong_elsewhere(
    words: str, expected: str | None
) -> None:
    assert save_directory_of(words.split()) == expected


def test_the_save_directory_of_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("save: runs/a\nbogus: 1\n")
    assert save_directory_of(["--config", str(tmp_path / "run.yaml")]) == "runs/a"
    assert save_directory_of(["--config", str(tmp_path / "run.yaml"), "--save", "runs/b"]) == "runs/b"
