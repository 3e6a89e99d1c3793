"""Spoilt manifests, journals of preprocessing, and files that name data sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.config.data_files import with_data_files
from megatron_let.data.identity import data_identity
from megatron_let.data.indexed import check_indexed
from megatron_let.data.manifest import manifest_path, read_manifest, require_manifest_of
from megatron_let.data.merge import merge
from megatron_let.data.outputs import Outputs
from megatron_let.data.preprocess import describe, preprocess
from megatron_let.data.preprocess_settings import PreprocessSettings
from megatron_let.data.tokenizers import NullTokenizer
from megatron_let.errors import ConfigError
from tests.fuzz.kit import CHANGES, EDITS, Changes, Edits, change, fuzz, said, spoil, to_json

TOKENIZER = NullTokenizer(60)
Killed = dict[str, bytes]


class _Kill(BaseException):
    """Stands for a kill between two chunks."""


def settings_in(root: Path, **changes: Any) -> PreprocessSettings:
    """Return settings that write a commit after each block of a few records."""
    values: dict[str, Any] = {
        "inputs": (str(root / "input.jsonl"),),
        "output_prefix": str(root / "out"),
        "block_bytes": 200,
        "commit_seconds": 0.0,
        "subset_key": "meta.name",
        "split_by_subset": True,
    }
    return PreprocessSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with an input and the pairs made of it."""
    return write_inputs(tmp_path_factory.mktemp("root"))


def write_inputs(root: Path) -> Path:
    """Write an input and the pairs made of it; return their directory."""
    lines = [
        json.dumps({"text": f"{n % 60} {n % 7}", "meta": {"name": "ab"[n % 2] + "\ud800"}}) for n in range(60)
    ]
    (root / "input.jsonl").write_text("\n".join(lines) + "\n")
    preprocess(settings_in(root, output_prefix=str(root / "whole")), TOKENIZER, lambda line: None)
    return root


@pytest.fixture(scope="module", params=["in the middle", "while installing"])
def killed(request: pytest.FixtureRequest, root: Path) -> Killed:
    """Return the working files of a run that was killed."""
    return killed_files(root, while_installing=request.param == "while installing")


def killed_files(root: Path, *, while_installing: bool) -> Killed:
    """Kill a run, there or in the middle, and return its working files: name -> content."""
    clear(root)
    blocks = 0
    add = Outputs.add

    def kill(*_: object) -> NoReturn:
        raise _Kill

    def add_some(*given: Any) -> None:
        nonlocal blocks
        blocks += 1
        if blocks > 3:
            raise _Kill
        add(*given)

    with pytest.MonkeyPatch.context() as patch:
        if while_installing:
            patch.setattr("megatron_let.data.preprocess.install", kill)
        else:
            patch.setattr(Outputs, "add", add_some)
        with pytest.raises(_Kill):
            preprocess(settings_in(root), TOKENIZER, lambda line: None)
    directory = root / "out.partial"
    content = {path.name: path.read_bytes() for path in directory.iterdir()}
    shutil.rmtree(directory)
    return content


def clear(root: Path) -> None:
    for path in root.glob("out*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def go_on(root: Path, killed: Killed, journal: bytes) -> str | None:
    """Have a run go on from a journal; return the line with which it was refused."""
    clear(root)
    directory = root / "out.partial"
    directory.mkdir()
    for name, content in killed.items():
        (directory / name).write_bytes(content)
    (directory / "journal.json").write_bytes(journal)
    before = {
        path for path in root.parent.rglob("*") if "out" not in path.name and directory not in path.parents
    }
    message = said(lambda: preprocess(settings_in(root), TOKENIZER, lambda line: None), "")
    assert message is None or str(root) in message or "--input names other files" in message
    after = {
        path for path in root.parent.rglob("*") if "out" not in path.name and directory not in path.parents
    }
    assert before == after, "nothing is written or moved outside the names of the run"
    return message


@fuzz(60)
@given(changes=CHANGES)
def test_a_journal_of_other_values_is_taken_up_or_refused(
    changes: Changes, root: Path, killed: Killed
) -> None:
    go_on(root, killed, to_json(change(json.loads(killed["journal.json"]), changes)))


@fuzz(30)
@given(edits=EDITS)
def test_a_journal_of_other_bytes_is_taken_up_or_refused(edits: Edits, root: Path, killed: Killed) -> None:
    go_on(root, killed, spoil(killed["journal.json"], edits))


def test_the_honest_journal_is_taken_up(root: Path, killed: Killed) -> None:
    assert go_on(root, killed, killed["journal.json"]) is None
    pairs = sorted(path.name for path in root.glob("out*.bin"))
    assert len(pairs) == 2
    for name in pairs:
        assert (root / name).read_bytes() == (root / name.replace("out", "whole", 1)).read_bytes()


@pytest.mark.parametrize("names", [["../input.jsonl", "_x"], ["0000", "/../x"], ["0000", "x"], ["..", "_x"]])
def test_a_journal_moves_no_file_of_others(names: list[str], root: Path, killed: Killed) -> None:
    journal = json.loads(killed["journal.json"])
    if not journal["installing"]:
        journal["progress"]["outputs"]["pairs"][0]["name"] = names[1]
    else:
        journal["progress"]["pairs"][0] = names
    message = go_on(root, killed, json.dumps(journal).encode())
    assert message is not None
    assert "cannot go on from" in message
    assert (root / "input.jsonl").exists()


def manifest_of(root: Path) -> tuple[str, bytes]:
    prefix = next(str(path).removesuffix(".bin") for path in sorted(root.glob("whole*.bin")))
    return prefix, manifest_path(prefix).read_bytes()


def use_manifest(content: bytes, root: Path, copy: Path) -> str | None:
    """Use a pair with a manifest of this content; return the line with which it was refused."""
    prefix, _ = manifest_of(root)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", f"{copy}{suffix}")
    manifest_path(str(copy)).write_bytes(content)

    def use() -> None:
        manifest = read_manifest(str(copy))
        if manifest is not None:
            require_manifest_of(manifest, check_indexed(str(copy)))
            describe(manifest, str(copy))
        data_identity(str(copy))
        merge([str(copy), prefix.replace("_a_", "_b_")], f"{copy}-merged", lambda line: None)

    return said(use, copy.parent)


@fuzz(150)
@given(changes=CHANGES)
def test_a_manifest_of_other_values_is_used_or_refused(changes: Changes, root: Path) -> None:
    content = change(json.loads(manifest_of(root)[1]), changes)
    use_manifest(to_json(content), root, root / "copy")


@fuzz(60)
@given(edits=EDITS)
def test_a_manifest_of_other_bytes_is_used_or_refused(edits: Edits, root: Path) -> None:
    use_manifest(spoil(manifest_of(root)[1], edits), root, root / "copy")


@pytest.mark.parametrize(
    ("change_of", "expected"),
    [
        ({"skipped": ["a"]}, "no proper skipped;"),
        ({"skipped_examples": "text"}, "no proper skipped_examples;"),
        ({"sources": [{"path": 1}]}, "no proper sources;"),
        ({"subsets": {"a": {"tokens": "x"}}}, "no proper subsets;"),
        ({"tokens": -2, "append_eod": 1}, "no proper tokens, append_eod;"),
        ({"idx_sha256": "\ud800"}, "no proper idx_sha256;"),
        ({"version": True}, "it has no version number"),
        ({"tool_version": 10**50}, "a number of 51 digits"),
        ({"more": float("inf")}, "Infinity is no number of JSON"),
        ({"more": "<deep>"}, "it is nested too deep"),
    ],
)
def test_a_manifest_with_a_value_of_another_kind(
    change_of: dict[str, Any], expected: str, root: Path, tmp_path: Path
) -> None:
    content = {**json.loads(manifest_of(root)[1]), **change_of}
    manifest_path(str(tmp_path / "a")).write_bytes(to_json(content))
    message = said(lambda: read_manifest(str(tmp_path / "a")), tmp_path)
    assert message is not None
    assert expected in message


def test_a_name_given_twice_in_a_manifest(root: Path, tmp_path: Path) -> None:
    path = manifest_path(str(tmp_path / "a"))
    path.write_bytes(manifest_of(root)[1].replace(b"{", b'{"eod": 1,', 1))
    with pytest.raises(ConfigError, match="eod is given twice"):
        read_manifest(str(tmp_path / "a"))


BLENDS = {"train": ["0.5", "a", 0.5, "b"], "valid": "c", "test": None}
NOT_GIVEN = dict.fromkeys(
    [
        "data_path",
        "train_data_path",
        "valid_data_path",
        "test_data_path",
        "data_args_path",
        "per_split_data_args_path",
    ]
)


def use_data_file(name: str, content: bytes, path: Path) -> str | None:
    path.write_bytes(content)
    return said(lambda: with_data_files({**NOT_GIVEN, name: str(path)}), path)


@fuzz(150)
@given(changes=CHANGES, edits=st.one_of(st.just([]), EDITS))
def test_spoilt_blends_by_split_are_used_or_refused(changes: Changes, edits: Edits, root: Path) -> None:
    use_data_file("per_split_data_args_path", spoil(to_json(change(BLENDS, changes)), edits), root / "blends")


@fuzz(100)
@given(edits=EDITS)
def test_spoilt_data_arguments_are_used_or_refused(edits: Edits, root: Path) -> None:
    use_data_file("data_args_path", spoil(b"0.25 data/a\n0.75 data/\xc3\xbc\n", edits), root / "arguments")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data_args_path", b"data/a\0b", "'data/a\\\\x00b' is not text"),
        ("per_split_data_args_path", b'{"train": "\\ud800"}', "is not text that a path can have"),
        ("per_split_data_args_path", b"[" * 100_000, "it is nested too deep"),
        ("per_split_data_args_path", b'{"train": [NaN, "a"]}', "NaN is no number"),
    ],
)
def test_a_file_of_data_sets_that_names_none(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    message = use_data_file(name, content, tmp_path / "file")
    assert message is not None
    assert expected.replace("'", "").replace("\\\\", "\\") in message
