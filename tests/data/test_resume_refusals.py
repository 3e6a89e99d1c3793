"""A stopped run goes on with the same arguments and input only, and its files go where they belong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data import continuing
from megatron_let.data.continuing import arguments_of
from megatron_let.data.preprocess import preprocess
from megatron_let.data.tokenizers import NullTokenizer
from megatron_let.errors import ConfigError
from tests.data.standard_input import piped_standard_input
from tests.data.stopped_runs import (
    TOKENIZER,
    Stopped,
    digests,
    settings_for,
    stopped_run,
    stopping_at_rename,
    whole_run,
)

OTHER_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "--append-eod": ({"append_eod": False}, "was True, is False"),
    "--json-keys": ({"json_keys": ("text", "title")}, r"was \['text'\], is \['text', 'title'\]"),
    "--split-by-subset": ({"split_by_subset": True}, "was False, is True"),
    "--max-document-bytes": ({"max_document_bytes": 10**6}, "was 134217728, is 1000000"),
    "--invalid-utf8": ({"invalid_utf8": "replace"}, "was skip, is replace"),
    "--input-format": ({"input_format": "jsonl"}, "was auto, is jsonl"),
    "--text-documents": ({"text_documents": "line"}, "was file, is line"),
    "--subset-key": ({"subset_key": "source"}, r"was meta\.pile_set_name, is source"),
}


@pytest.mark.parametrize("name", list(OTHER_ARGUMENTS))
def test_other_arguments_are_refused_and_restart_begins_anew(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, message = OTHER_ARGUMENTS[name]
    expected = whole_run(tmp_path / "whole" / "out", inputs, **changes)
    (tmp_path / "stopped").mkdir()
    prefix = tmp_path / "stopped" / "out"
    stopped_run(settings_for(prefix, inputs), 40, monkeypatch)
    before = digests(tmp_path / "stopped")
    with pytest.raises(ConfigError, match=rf"\({name} {message}\): give the same to go on, or --restart"):
        preprocess(settings_for(prefix, inputs, **changes), TOKENIZER, lambda line: None)
    assert digests(tmp_path / "stopped") == before
    preprocess(settings_for(prefix, inputs, **changes, restart=True), TOKENIZER, lambda line: None)
    assert digests(tmp_path / "stopped") == expected


def test_every_argument_that_decides_over_the_bytes_is_compared(tmp_path: Path) -> None:
    compared = set(arguments_of(settings_for(tmp_path / "out", ["a"]), TOKENIZER))
    assert compared == {*OTHER_ARGUMENTS, "--input", "the tokenizer", "versions"}


class OtherEnd(NullTokenizer):
    """The same ids for every text, another end of document."""

    def __init__(self) -> None:
        super().__init__(60000)
        self.eod = 7


@pytest.mark.parametrize("tokenizer", [NullTokenizer(60001), OtherEnd()])
def test_another_tokenizer_is_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: NullTokenizer
) -> None:
    stopped_run(settings_for(tmp_path / "out", inputs), 40, monkeypatch)
    with pytest.raises(ConfigError, match=r"\(the tokenizer was"):
        preprocess(settings_for(tmp_path / "out", inputs), tokenizer, lambda line: None)


@pytest.mark.parametrize("name", ["__version__", "version"])
def test_another_version_is_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stopped_run(settings_for(tmp_path / "out", inputs), 40, monkeypatch)
    monkeypatch.setattr(continuing, name, "9.9" if name == "__version__" else lambda package: "9.9")
    with pytest.raises(ConfigError, match=r"\(versions was"):
        preprocess(settings_for(tmp_path / "out", inputs), TOKENIZER, lambda line: None)


def test_a_restart_that_cannot_begin_leaves_the_stopped_run(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(settings_for(tmp_path / "out", inputs), 40, monkeypatch)
    before = digests(tmp_path / "out.partial")
    with pytest.raises(ConfigError, match="does not exist"):
        preprocess(settings_for(tmp_path / "out", ["typo.jsonl"], restart=True), TOKENIZER, lambda line: None)
    assert digests(tmp_path / "out.partial") == before


def test_other_files_in_the_same_directory_are_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "inputs"
    directory.mkdir()
    for path in inputs:
        (directory / Path(path).name).write_bytes(Path(path).read_bytes())
    stopped_run(settings_for(tmp_path / "out", [str(directory)]), 40, monkeypatch)
    (directory / "d.jsonl").write_text('{"text": "1"}\n')
    with pytest.raises(ConfigError, match=r"names other files than the stopped run \(.*d\.jsonl\)"):
        preprocess(settings_for(tmp_path / "out", [str(directory)]), TOKENIZER, lambda line: None)


@pytest.mark.parametrize("is_changed", [False, True])
@pytest.mark.parametrize("count", [20, 70])
def test_standard_input_fed_again_must_be_the_same(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, is_changed: bool
) -> None:
    """Stopped in the middle of it, and after its end."""
    expected = whole_run(tmp_path / "whole" / "out", [inputs[0], inputs[1]])
    content = Path(inputs[0]).read_bytes()
    (tmp_path / "stopped").mkdir()
    settings = settings_for(tmp_path / "stopped" / "out", ["-", inputs[1]])
    with piped_standard_input(monkeypatch, content):
        stopped_run(settings, count, monkeypatch)
    if is_changed:
        content = content.replace(b"7", b"8", 1)
        with piped_standard_input(monkeypatch, content), pytest.raises(ConfigError, match="changed since"):
            preprocess(settings, TOKENIZER, lambda line: None)
        return
    with piped_standard_input(monkeypatch, content):
        preprocess(settings, TOKENIZER, lambda line: None)
    for kind in ("bin", "idx"):
        name = f"out_text_document.{kind}"
        assert digests(tmp_path / "stopped")[name] == expected[name]


@pytest.mark.parametrize("change", ["same size", "longer", "touched", "fewer files", "other order"])
@pytest.mark.parametrize("which", ["finished", "half read"])
def test_a_changed_input_is_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, which: str
) -> None:
    copies = [tmp_path / Path(path).name for path in inputs]
    for path, copy in zip(inputs, copies, strict=True):
        copy.write_bytes(Path(path).read_bytes())
    names = [str(copy) for copy in copies]
    expected = whole_run(tmp_path / "whole" / "out", names)
    (tmp_path / "run").mkdir()
    prefix = tmp_path / "run" / "out"
    # The first file has some 45 blocks: either it is read to its end, or half of it.
    stopped_run(settings_for(prefix, names), 70 if which == "finished" else 20, monkeypatch)
    content = bytearray(copies[0].read_bytes())
    if change == "same size":
        content[100] ^= 1
        copies[0].write_bytes(content)
    elif change == "longer":
        copies[0].write_bytes(content + b"{}\n")
    elif change == "touched":
        copies[0].write_bytes(content)
        os.utime(copies[0], (1, 1))
    elif change == "fewer files":
        names = names[:2]
    else:
        names = [names[1], names[0], names[2]]
    if change == "touched":
        preprocess(settings_for(prefix, names), TOKENIZER, lambda line: None)
        assert digests(tmp_path / "run") == expected
        return
    with pytest.raises(ConfigError, match=r"--input|has changed|had .* bytes") as caught:
        preprocess(settings_for(prefix, names), TOKENIZER, lambda line: None)
    assert "--restart" in str(caught.value)


def test_finished_files_go_where_the_second_call_says_and_of_the_same_input(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working directory the prefix is another word for the same place."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    copy = tmp_path / "input.jsonl"
    copy.write_bytes(Path(inputs[0]).read_bytes())
    monkeypatch.chdir(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping_at_rename(0))
        with pytest.raises(Stopped):
            preprocess(settings_for(Path("out"), [str(copy)]), TOKENIZER, lambda line: None)
    monkeypatch.chdir(tmp_path / "y")
    again = settings_for(tmp_path / "x" / "out", [str(copy)])
    content = copy.read_bytes()
    copy.write_bytes(content.replace(b"7", b"8", 1))
    with pytest.raises(ConfigError, match="has changed since the stopped run read it"):
        preprocess(again, TOKENIZER, lambda line: None)
    copy.write_bytes(content)
    with pytest.raises(ConfigError, match="--append-eod was True, is False"):
        preprocess(
            settings_for(tmp_path / "x" / "out", [str(copy)], append_eod=False), TOKENIZER, lambda line: None
        )
    preprocess(again, TOKENIZER, lambda line: None)
    assert list((tmp_path / "y").iterdir()) == []
    assert len(list((tmp_path / "x").iterdir())) == 3
