"""Joining pairs: bytes of megatron.core's own merge, manifests added up, and what would be wrong data refused."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_let import __version__
from megatron_let.data import merge as merge_module
from megatron_let.data.index_tables import open_tables
from megatron_let.data.indexed import check_indexed
from megatron_let.data.journal import Journal, WorkingDirectory
from megatron_let.data.manifest import Manifest, SourceFile, SubsetCount, read_manifest, write_manifest
from megatron_let.data.merge import find_pairs, merge
from megatron_let.errors import ConfigError, LetError
from tests.data.test_indexed import files_of, write_with_core, write_with_ours
from tests.data.test_manifest import MANIFEST

FIRST = [[[1, 2, 3]], [[4], [5, 6]], [[7]]]
SECOND = [[[8]], [], [[9, 10], [11]]]
THIRD = [[[12, 13]]]


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    """Return three pairs, the second with a document without sequences."""
    for name, documents in (("a", FIRST), ("b", SECOND), ("c", THIRD)):
        write_with_core(tmp_path / name, documents, "uint16")
    return [str(tmp_path / name) for name in "abc"]


def manifest_for(prefix: str, **changes: Any) -> Manifest:
    summary = check_indexed(prefix)
    data, index = (hashlib.sha256(part).hexdigest() for part in files_of(Path(prefix)))
    counts = {name: getattr(summary, name) for name in ("documents", "sequences", "tokens", "dtype")}
    return replace(MANIFEST, **{**counts, "bin_sha256": data, "idx_sha256": index, **changes})


def merged(prefixes: Sequence[str], output: Path) -> list[str]:
    lines: list[str] = []
    merge(prefixes, str(output), lines.append)
    return lines


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_the_bytes_are_those_of_megatron_core(
    prefixes: list[str], tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module, "_CHUNK_BYTES", 2 * chunk)
    monkeypatch.setattr(merge_module, "CHUNK", chunk)
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.uint16)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(str(tmp_path / "core.idx"))
    lines = merged(prefixes, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "core")
    assert "no manifest is written" in lines[-1]
    assert read_manifest(str(tmp_path / "out")) is None
    assert not (tmp_path / "out.partial").exists()


def test_manifests_are_added_up(prefixes: list[str], tmp_path: Path) -> None:
    for number, prefix in enumerate(prefixes, start=1):
        changes = {
            "max_token_id": 10 * number,
            "bytes": number,
            "records": 4,
            "eod_in_text": number,
            "skipped": {"blank_line": 1, f"reason_{number}": 2},
            "skipped_examples": tuple(f"{number}:{line}" for line in range(6)),
            "sources": (SourceFile(f"{number}.jsonl", number, "ab"),),
            "subsets": {"web": SubsetCount(1, 2, 3), f"own_{number}": SubsetCount(1, 1, 1)},
        }
        write_manifest(prefix, manifest_for(prefix, **changes))
    merged(prefixes, tmp_path / "out")
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest is not None
    summary = check_indexed(str(tmp_path / "out"))
    assert (manifest.documents, manifest.sequences, manifest.tokens) == (7, 8, 13)
    assert (summary.documents, summary.sequences, summary.tokens) == (7, 8, 13)
    assert (manifest.max_token_id, manifest.bytes, manifest.records, manifest.eod_in_text) == (30, 6, 12, 6)
    assert manifest.skipped == {"blank_line": 3, "reason_1": 2, "reason_2": 2, "reason_3": 2}
    assert manifest.skipped_examples == (
        *(f"1:{line}" for line in range(6)),
        *(f"2:{line}" for line in range(4)),
    )
    assert [source.path for source in manifest.sources] == ["1.jsonl", "2.jsonl", "3.jsonl"]
    assert manifest.subsets["web"] == SubsetCount(3, 6, 9)
    assert set(manifest.subsets) == {"web", "own_1", "own_2", "own_3"}
    digests = tuple(hashlib.sha256(part).hexdigest() for part in files_of(tmp_path / "out"))
    assert (manifest.bin_sha256, manifest.idx_sha256) == digests


@pytest.mark.parametrize(
    ("subsets", "expected"),
    [(("web", "web", "web"), "web"), (("web", "code", "web"), None), ((None, "web", "web"), None)],
)
def test_a_subset_is_the_results_only_where_it_is_that_of_all(
    prefixes: list[str], tmp_path: Path, subsets: Sequence[str | None], expected: str | None
) -> None:
    for prefix, subset in zip(prefixes, subsets, strict=True):
        write_manifest(prefix, manifest_for(prefix, subset=subset))
    merged(prefixes, tmp_path / "out")
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest is not None
    assert manifest.subset == expected


def test_all_keys_are_named_and_the_version_is_of_who_merged(prefixes: list[str], tmp_path: Path) -> None:
    for prefix, key in zip(prefixes, ("text", "title", "text"), strict=True):
        write_manifest(prefix, manifest_for(prefix, json_key=key, tool_version="0.0.1"))
    merged(prefixes, tmp_path / "out")
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest is not None
    assert manifest.json_key == "text,title"
    assert manifest.tool_version == __version__


def test_lengths_that_add_up_beyond_32_bits_are_taken(tmp_path: Path) -> None:
    lengths = np.array([2**31 - 1, 2**31 - 1, 5], dtype="<i4")
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    with (tmp_path / "long.idx").open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 2))
        for table in (lengths, np.array([0, *ends[:-1]], dtype="<i8"), np.array([0, 3], dtype="<i8")):
            stream.write(table.tobytes())
    with (tmp_path / "long.bin").open("wb") as data:
        data.truncate(int(ends[-1]))  # a hole: takes no room on the disk
    (found,) = merge_module._lengths(open_tables(str(tmp_path / "long")))
    assert found.tolist() == lengths.tolist()
    assert check_indexed(str(tmp_path / "long")).tokens == lengths.sum(dtype=np.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer_fingerprint": "cd" * 32},
            r"differ in their tokenizers, .*: tokenizer_fingerprint abababababab and cdcdcdcdcdcd; one",
        ),
        ({"eod": 5}, r"differ in their tokenizers, .*: eod \d+ and 5; one data set needs one"),
        ({"append_eod": False}, "differ in append_eod"),
        ({"encoding_fingerprint": "1:bb"}, "differ in their tokenizers, .*: encoding_fingerprint aa and bb"),
        ({"vocab_size": 401}, r"differ in their tokenizers, .*: vocab_size 400 and 401"),
        ({"tokens": 99}, "belongs to other files"),
        ({"bin_sha256": "cd" * 32}, r"b\.bin is not the file that its manifest describes"),
    ],
)
def test_pairs_that_are_not_one_data_set_are_refused(
    prefixes: list[str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_manifest(prefixes[0], manifest_for(prefixes[0], encoding_fingerprint="1:aa"))
    write_manifest(prefixes[1], manifest_for(prefixes[1], **changes))
    with pytest.raises(ConfigError, match=message):
        merged(prefixes, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_another_id_type_is_refused(prefixes: list[str], tmp_path: Path) -> None:
    write_with_ours(tmp_path / "wide", [[[1]]], "int32")
    with pytest.raises(ConfigError, match=r"uint16 ids and .*wide int32"):
        merged([*prefixes, str(tmp_path / "wide")], tmp_path / "out")


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (34 + 4, "<i", 9, "do not lie back to back"),
        (34 + 4 * 4 + 8, "<q", 2, "do not lie back to back"),
        (34 + 4, "<i", -1, "do not lie back to back"),
        (34 + 12 * 4 + 8, "<q", 4, "documents are out of order"),
    ],
)
def test_a_damaged_table_is_refused(
    prefixes: list[str], tmp_path: Path, offset: int, layout: str, value: int, message: str
) -> None:
    path = Path(f"{prefixes[0]}.idx")
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, value)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        merged(prefixes, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_output_may_not_be_an_input_and_no_input_comes_twice(prefixes: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is one of the inputs"):
        merged(prefixes, tmp_path / "a")
    with pytest.raises(ConfigError, match="given twice"):
        find_pairs([*prefixes, str(tmp_path / "." / "b")])
    with pytest.raises(ConfigError, match="names no pair"):
        merged([], tmp_path / "out")


@pytest.mark.parametrize("is_readable", [True, False])
def test_a_stopped_run_of_preprocessing_is_not_deleted(
    prefixes: list[str], tmp_path: Path, is_readable: bool
) -> None:
    with WorkingDirectory(str(tmp_path / "out")) as directory:
        directory.write_journal(Journal({}, {}))
        (directory.path / "pair0.bin").write_bytes(b"tokens")
        if not is_readable:
            (directory.path / "journal.json").write_text("{")
    before = {path.name: path.read_bytes() for path in directory.path.iterdir()}
    with pytest.raises(ConfigError, match=r"a stopped run of preprocessing lies in .*out\.partial"):
        merged(prefixes, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in directory.path.iterdir()} == before
    assert len(before) == 3


@pytest.mark.parametrize("have_manifests", [True, False])
def test_a_copy_under_another_name_is_refused(
    prefixes: list[str], tmp_path: Path, have_manifests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with_core(tmp_path / "copy", FIRST, "uint16")
    if have_manifests:  # then before any work
        write_manifest(prefixes[0], manifest_for(prefixes[0]))
        write_manifest(f"{tmp_path}/copy", manifest_for(f"{tmp_path}/copy"))
        monkeypatch.delattr(merge_module, "IndexedWriter")
    with pytest.raises(ConfigError, match=r"/a\.bin and .*/copy\.bin have the same content.*counted twice"):
        merged([*prefixes, f"{tmp_path}/copy"], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_source_of_several_pairs_is_listed_once(prefixes: list[str], tmp_path: Path) -> None:
    common = (SourceFile("1.jsonl", 9, "ab"), SourceFile("2.jsonl", 9, "cd"))
    changed = SourceFile("1.jsonl", 9, "ef")
    for prefix, sources in zip(prefixes, (common, common, (changed, common[1])), strict=True):
        write_manifest(prefix, manifest_for(prefix, sources=sources))
    merged(prefixes, tmp_path / "out")
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest is not None
    assert manifest.sources == (*common, changed)


def test_a_directory_stands_for_its_pairs_by_name(prefixes: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert find_pairs([str(tmp_path)]) == prefixes
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no \.bin and \.idx files"):
        find_pairs([str(tmp_path / "empty")])
    (tmp_path / "half.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"half has no half\.idx"):
        merged(find_pairs([str(tmp_path)]), tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_the_old_pair(
    prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with_ours(tmp_path / "out", THIRD, "uint16")
    before = files_of(tmp_path / "out")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_let.data.indexed_writer.IndexedWriter.add_tokens", full)
    with pytest.raises(LetError, match="No space left on device; nothing was written over"):
        merged(prefixes, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
