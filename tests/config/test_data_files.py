"""Blends out of files: what the file holds is what the flag would have been given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.training.arguments import parse_arguments
from tests.config.conftest import GOOD_RUN

RUN = GOOD_RUN.replace("--mock-data", "").split()


def parse(*words: object) -> RunConfig:
    return resolve(parse_arguments([*RUN, *map(str, words)]), 1)


def message_of(*words: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_of_words_is_the_data_path(tmp_path: Path) -> None:
    path = write(tmp_path / "blend.txt", "0.3 a\n0.7\tb\n")
    config = parse("--data-args-path", path, "--split", "9,1,0")
    assert config == parse("--data-path", "0.3", "a", "0.7", "b", "--split", "9,1,0")
    assert "data_args_path" not in config.to_yaml()
    assert parse_arguments(["--config", str(write(tmp_path / "run.yaml", config.to_yaml()))]) == config


def test_a_json_file_is_the_data_path_of_each_split(tmp_path: Path) -> None:
    content = {"train": [0.25, "a", "0.75", "b"], "valid": "c d", "test": None}
    config = parse("--per-split-data-args-path", write(tmp_path / "blend.json", content))
    words = ["--train-data-path", "0.25", "a", "0.75", "b", "--valid-data-path", "c", "d"]
    assert config == parse(*words)
    assert config.data.test_data_path is None
    assert config.data.split is None


def test_the_command_line_replaces_the_config_files_way_of_saying_it(tmp_path: Path) -> None:
    blend = write(tmp_path / "blend.txt", "other")
    splits = write(tmp_path / "blend.json", {"train": "x", "valid": "y"})
    plain = write(tmp_path / "plain.yaml", "data_path: [a]\n")
    assert parse("--config", plain, "--data-args-path", blend).data.data_path == ("other",)
    by_file = write(tmp_path / "by_file.yaml", f"data-args-path: {blend}\n")
    assert parse("--config", by_file).data.data_path == ("other",)
    assert parse("--config", by_file, "--data-path", "a").data.data_path == ("a",)
    three = write(
        tmp_path / "three.yaml", "train_data_path: [a]\nvalid_data_path: [b]\ntest_data_path: [c]\n"
    )
    data = parse("--config", three, "--per-split-data-args-path", splits).data
    assert (data.train_data_path, data.valid_data_path, data.test_data_path) == (("x",), ("y",), None)


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--data-args-path", "  \n", "is empty; it holds what --data-path takes"),
        ("--data-args-path", "0.5 a 0.5", "--data-path is one or more prefixes, or WEIGHT PREFIX"),
        ("--per-split-data-args-path", "{", "is not JSON"),
        ("--per-split-data-args-path", [], "with the keys train, valid and test"),
        ("--per-split-data-args-path", {}, "with the keys train, valid and test"),
        ("--per-split-data-args-path", {"validation": "a"}, "with the keys train, valid and test"),
        ("--per-split-data-args-path", {"train": {"a": 1}}, "train must be a list of words"),
        ("--per-split-data-args-path", {"train": [True]}, "train must be a list of words"),
        ("--per-split-data-args-path", {"train": []}, "names no data set"),
        ("--per-split-data-args-path", {"valid": "a"}, "without --train-data-path"),
        ("--per-split-data-args-path", {"train": ["a", 0.5]}, "--train-data-path is one or more prefixes"),
    ],
)
def test_a_file_that_says_nothing_of_use_is_one_line(
    flag: str, content: Any, message: str, tmp_path: Path
) -> None:
    assert message in message_of(flag, write(tmp_path / "blend", content))


def test_a_file_that_cannot_be_read_and_two_ways_at_once_are_one_line(tmp_path: Path) -> None:
    for flag in ("--data-args-path", "--per-split-data-args-path"):
        assert f"{flag} /nowhere cannot be read: No such file" in message_of(flag, "/nowhere")
        (tmp_path / "latin").write_bytes(b"caf\xe9")
        assert "not UTF-8" in message_of(flag, tmp_path / "latin")
    blend = write(tmp_path / "blend.txt", "a")
    assert "--data-args-path and --data-path say the same thing" in message_of(
        "--data-args-path", blend, "--data-path", "a"
    )
    splits = write(tmp_path / "blend.json", {"train": "a"})
    assert "and --valid-data-path say the same thing" in message_of(
        "--per-split-data-args-path", splits, "--valid-data-path", "a"
    )
    assert "give one source of data" in message_of(
        "--per-split-data-args-path", splits, "--data-args-path", blend
    )
    assert "give one source of data" in message_of("--data-args-path", blend, "--mock-data")
