"""What --input names: files, globs, directories and standard input, in an order that never changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_let.data.input_paths import data_suffix, expand_inputs
from megatron_let.data.journal import WorkingDirectory
from megatron_let.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def expanded(inputs: list[str]) -> tuple[str, ...]:
    return tuple(item.path for item in expand_inputs(inputs).paths)


def unread(inputs: list[str]) -> dict[str, str]:
    return {file.path: file.reason for file in expand_inputs(inputs).unread}


def touch(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_named_files_are_taken_as_they_come_whatever_their_names() -> None:
    touch("b", ".hidden", "a.bin")
    assert expanded(["b", "-", ".hidden", "absent", "a.bin"]) == ("b", "-", ".hidden", "absent", "a.bin")


def test_a_directory_gives_the_data_files_below_it_sorted_and_names_the_others() -> None:
    data = ("d/b.jsonl", "d/a/z.json.gz", "d/a/y.NDJSON.ZST", "d/c.txt.zstd", "d/e.parquet", "d/f.g.txt")
    others = ("d/.x.jsonl", "d/.h/x.jsonl", "d/readme.md", "d/a.gz", "d/jsonl", "d/z.py", "d/.git/x")
    touch(*data, *others)
    assert expanded(["d"]) == tuple(sorted(data))
    assert unread(["d"]) == {
        "d/.h/x.jsonl": "hidden",
        "d/.x.jsonl": "hidden",
        **dict.fromkeys(("d/a.gz", "d/jsonl", "d/readme.md", "d/z.py"), "other_kind"),
    }


def test_a_directory_with_data_alone_leaves_nothing_out() -> None:
    touch("d/b.jsonl")
    assert expanded(["d", "d/"]) == ("d/b.jsonl", "d/b.jsonl")
    assert not unread(["d"])


def test_what_preprocessing_puts_into_its_input_directory_is_not_read_and_named() -> None:
    touch("d/a.jsonl", "d/b.partial.jsonl", "d/subsets.json", "d/blend.txt")
    touch("d/out.partial/journal.json", "d/out.partial/0000.json", "d/e/out.partial/x/y.jsonl")
    touch("d/out_text_document.manifest.json", "d/out_text_subsets.json", "d/e/out_text_blend.txt")
    expected = ("d/a.jsonl", "d/b.partial.jsonl", "d/blend.txt", "d/subsets.json")
    assert expanded(["d"]) == expected
    assert unread(["d"]) == {
        "d/e/out.partial/x/y.jsonl": "in_a_partial_directory",
        "d/e/out_text_blend.txt": "output_of_preprocessing",
        "d/out.partial/0000.json": "in_a_partial_directory",
        "d/out.partial/journal.json": "in_a_partial_directory",
        "d/out_text_document.manifest.json": "output_of_preprocessing",
        "d/out_text_subsets.json": "output_of_preprocessing",
    }
    # What a run is writing is no input that somebody could miss.
    with WorkingDirectory("d/run") as directory:
        (directory.path / "0000.json").touch()
        assert not [path for path in unread(["d"]) if "run" in path]
    # Named, they are read as any file is.
    assert expanded(["d/*_subsets.json"]) == ("d/out_text_subsets.json",)


def test_links_are_followed_and_a_ring_of_them_ends() -> None:
    touch("elsewhere/a.jsonl", "d/b.jsonl")
    os.symlink("../elsewhere", "d/linked")
    os.symlink("..", "elsewhere/up")
    os.symlink(".", "d/self")
    os.symlink("absent", "d/broken.jsonl")
    assert expanded(["d"]) == ("d/b.jsonl", "d/broken.jsonl", "d/linked/a.jsonl")


def test_a_link_into_a_hidden_directory_is_read_whatever_comes_first() -> None:
    touch("d/.store/a.jsonl", "d/.store/b/c.jsonl", "d/.other/x.jsonl")
    os.symlink("../.store", "d/.other/linked")
    Path("d/z").mkdir()
    os.symlink("../.store", "d/z/data")
    assert expanded(["d"]) == ("d/z/data/a.jsonl", "d/z/data/b/c.jsonl")
    assert unread(["d"]) == {"d/.other/x.jsonl": "hidden"}


def test_globs_are_expanded_sorted_and_at_any_depth() -> None:
    touch("c-2.x", "c-10.x", "c-1.x", "d/c-3.x", "d/e/c-4.x", "d/.c-5.x")
    assert expanded(["c-*.x"]) == ("c-1.x", "c-10.x", "c-2.x")
    assert expanded(["c-[12].x", "c-1?.x"]) == ("c-1.x", "c-2.x", "c-10.x")
    assert expanded(["**/c-*.x"]) == ("c-1.x", "c-10.x", "c-2.x", "d/c-3.x", "d/e/c-4.x")
    assert expanded(["d/**"]) == ("d/c-3.x", "d/e/c-4.x")


def test_directories_that_a_glob_matches_are_read_as_the_shell_would_give_them() -> None:
    touch("shard-1/a.jsonl", "shard-2/a.jsonl", "shard-3")
    assert expanded(["shard-*"]) == ("shard-1/a.jsonl", "shard-2/a.jsonl", "shard-3")


def test_a_file_whose_name_looks_like_a_glob_is_that_file() -> None:
    touch("a[1].jsonl", "a1.jsonl", "d[x]/b.txt")
    assert expanded(["a[1].jsonl", "d[x]"]) == ("a[1].jsonl", "d[x]/b.txt")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], r"^--input names nothing: give files"),
        (["-", "a", "-"], r"^--input - is given twice"),
        (["x*.jsonl"], r"^input x\*\.jsonl matches no file"),
        (["only_directories/**"], r"matches no file"),
        (["none"], r"^input directory none holds no file of a known kind \(\.jsonl, .+name the files"),
        (["no*"], r"^input directory none holds no file"),
        (["empty"], r"^input directory empty holds no file"),
        (
            ["s3://bucket/a.jsonl"],
            r"^input s3://bucket/a.jsonl is an address, and only files of this machine",
        ),
        (["hf://datasets/a/b/*.parquet"], r"is an address"),
        (["https://host/a.jsonl.zst"], r"is an address"),
    ],
)
def test_what_stands_for_nothing_is_an_error(inputs: list[str], message: str) -> None:
    touch("none/a.csv", "none/.a.jsonl")
    for directory in ("empty", "only_directories/a/b"):
        Path(directory).mkdir(parents=True)
    with pytest.raises(ConfigError, match=message):
        expanded(inputs)


def test_a_directory_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    touch("d/a.jsonl", "d/locked/b.jsonl")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match="cannot read input directory d/locked: Permission denied"):
        expanded(["d"])


@pytest.mark.parametrize(
    ("path", "suffix"),
    [
        ("a.txt", ".txt"),
        ("a.TXT.GZ", ".txt"),
        ("x.y/a.json.zstd", ".json"),
        ("a.gz", ""),
        ("a", ""),
        (".txt", ""),
    ],
)
def test_the_suffix_of_a_compression_does_not_count(path: str, suffix: str) -> None:
    assert data_suffix(path) == suffix
