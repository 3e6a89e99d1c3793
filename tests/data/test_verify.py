"""The full check: whole files pass, and a file damaged just so fails the check that is there for it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_let.data import token_scan
from megatron_let.data.byte_progress import ByteProgress
from megatron_let.data.indexed import check_indexed
from megatron_let.data.manifest import Manifest, manifest_path, read_manifest
from megatron_let.data.table_checks import Check
from megatron_let.data.tokenizers import NullTokenizer
from megatron_let.data.verify import Expected, add_manifest, verify
from megatron_let.errors import ConfigError
from tests.data.foreign import Documents, edit_index, write_as_neox

DOCUMENTS: Documents = [[[1, 2, 9]], [[4, 9], [5, 6, 9]], [], [[7, 9]], [[3, 3, 9]]]
"""Five documents, five sequences, thirteen tokens; id 9 ends a document and stands once inside one."""
POINTERS, BOUNDS = 34 + 4 * 5, 34 + 12 * 5
TOKENIZER = NullTokenizer(9)
NAMES = ["files", "lengths", "pointers", "documents", "ids", "eod", "manifest", "checksums"]


def quiet(line: str) -> None:
    """Drop a line of progress."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read two table entries and two to four tokens at a time, so that every check crosses pieces."""
    for module in ("index_tables", "table_checks"):
        monkeypatch.setattr(f"megatron_let.data.{module}.CHUNK", 2)
    monkeypatch.setattr(token_scan, "_BLOCK_BYTES", 8)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Return the prefix of a whole pair with a manifest."""
    write_as_neox(tmp_path / "pair", DOCUMENTS, "uint16")
    add_manifest(str(tmp_path / "pair"), TOKENIZER, quiet)
    return tmp_path / "pair"


def manifest_of(prefix: Path) -> Manifest:
    manifest = read_manifest(str(prefix))
    assert manifest is not None
    return manifest


def checks(prefix: Path, **changes: object) -> dict[str, Check]:
    """Return the checks against the pair's manifest with `changes`, by name."""
    manifest = replace(manifest_of(prefix), **changes)  # type: ignore[arg-type]
    return {check.name: check for check in verify(str(prefix), Expected(manifest), quiet)}


def failures(found: dict[str, Check]) -> dict[str, str]:
    return {name: check.problem for name, check in found.items() if check.problem is not None}


def edit_token(prefix: Path, token: int, value: int) -> None:
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    struct.pack_into("<H", content, 2 * token, value)
    Path(f"{prefix}.bin").write_bytes(content)


def test_a_whole_pair_passes_every_check(pair: Path) -> None:
    found = checks(pair)
    assert list(found) == NAMES
    assert failures(found) == {}
    lines = [check.line() for check in found.values()]
    assert lines[0] == "files: ok, 26 and 142 bytes, uint16 ids"
    assert lines[3] == "documents: ok, 5 documents, 1 of them empty"
    assert lines[4] == "ids: ok, the largest is 9 of 0 to 9"
    assert lines[5] == (
        "eod: ok, 4 of 4 documents with tokens end in id 9, which stands 1 times inside documents"
    )


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "length below 0": (
        lambda pair: edit_index(pair, 34 + 4 * 2, "<i", -3),
        "lengths",
        "sequence 2 has -3 tokens",
    ),
    "gap": (
        lambda pair: edit_index(pair, POINTERS + 8 * 3, "<q", 18),
        "pointers",
        "sequence 3 begins at byte 18, 2 bytes after the end of the one before it (byte 16)",
    ),
    "overlap": (
        lambda pair: edit_index(pair, POINTERS + 8 * 2, "<q", 8),
        "pointers",
        "sequence 2 begins at byte 8, 2 bytes before the end of the one before it (byte 10)",
    ),
    "documents run back": (
        lambda pair: edit_index(pair, BOUNDS + 8 * 3, "<q", 2),
        "documents",
        "document 2 begins at sequence 3 and ends at 2",
    ),
    "documents run back from one piece to the next": (
        lambda pair: edit_index(pair, BOUNDS + 8 * 2, "<q", 0),
        "documents",
        "document 1 begins at sequence 1 and ends at 0",
    ),
    "document beyond the end": (
        lambda pair: edit_index(pair, BOUNDS + 8 * 4, "<q", 9),
        "documents",
        "document 4 begins at sequence 9 and ends at 5",
    ),
    "first document": (
        lambda pair: edit_index(pair, BOUNDS, "<q", 1),
        "files",
        "its documents do not cover its 5 sequences",
    ),
    "id too large": (
        lambda pair: edit_token(pair, 6, 10),
        "ids",
        "id 10 at document 1 (sequence 2, token 1), allowed are 0 to 9; the largest is 10",
    ),
    "no eod": (
        lambda pair: edit_token(pair, 9, 3),
        "eod",
        "the last token at document 3 (sequence 3, token 1) is not id 9: 3 of 4 documents with tokens end in id 9, "
        "which stands 1 times inside documents",
    ),
    "another token": (lambda pair: edit_token(pair, 0, 2), "checksums", "pair.bin has SHA-256"),
    "bound moved inside the data": (
        lambda pair: edit_index(pair, BOUNDS + 8, "<q", 2),
        "checksums",
        "pair.idx has SHA-256",
    ),
    "bin cut off": (
        lambda pair: Path(f"{pair}.bin").write_bytes(Path(f"{pair}.bin").read_bytes()[:-2]),
        "files",
        "one of them is cut off",
    ),
    "idx cut off": (
        lambda pair: Path(f"{pair}.idx").write_bytes(Path(f"{pair}.idx").read_bytes()[:-8]),
        "files",
        "pair.idx is cut off",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_found_by_its_check_and_placed(damage: str, pair: Path) -> None:
    spoil, name, expected = DAMAGES[damage]
    spoil(pair)
    problems = failures(checks(pair))
    assert expected in problems[name]
    # Any change breaks a checksum, a length moves what comes after it, and a new largest id is not the manifest's.
    follow = {"checksums"} | {"lengths": {"pointers"}, "ids": {"manifest"}}.get(name, set())
    assert set(problems) <= {name} | follow


def test_ids_are_looked_at_even_when_the_tables_are_damaged(pair: Path) -> None:
    edit_index(pair, POINTERS + 8, "<q", 8)
    edit_token(pair, 6, 10)
    found = checks(pair)
    assert failures(found)["ids"].startswith("id 10 at token 6, allowed are 0 to 9")
    assert found["eod"].line() == "eod: ok, not looked at: damaged tables"


def test_the_eod_is_required_only_where_the_manifest_promises_it(pair: Path) -> None:
    edit_token(pair, 9, 3)
    unsummed = {"bin_sha256": "", "idx_sha256": ""}
    found = checks(pair, append_eod=False, **unsummed)
    assert failures(found) == {}
    assert "3 of 4 documents" in found["eod"].line()
    assert found["checksums"].line() == "checksums: ok, not looked at: the manifest has none"
    assert set(failures(checks(pair, **unsummed))) == {"eod"}


@pytest.mark.parametrize(
    ("changes", "stated"),
    [
        ({"documents": 4}, "documents 4"),
        ({"sequences": 6}, "sequences 6"),
        ({"tokens": 14}, "tokens 14"),
        ({"dtype": "int16"}, "dtype int16"),
        ({"max_token_id": 8}, "max_token_id 8"),
    ],
)
def test_a_manifest_of_other_files_is_found(pair: Path, changes: dict[str, object], stated: str) -> None:
    problems = failures(checks(pair, **changes))
    assert set(problems) == {"manifest"}
    assert f"belongs to other files: it states {stated}" in problems["manifest"]


def test_without_manifest_and_tokenizer_the_ranges_are_reported(tmp_path: Path) -> None:
    write_as_neox(tmp_path / "pair", DOCUMENTS, "int32")
    found = [check.line() for check in verify(str(tmp_path / "pair"), Expected(), quiet)]
    assert found[-2:] == [
        "ids: ok, the largest is 9 of an unknown vocabulary",
        "eod: ok, not looked at: no tokenizer",
    ]
    write_as_neox(tmp_path / "pair", [[[1, -2]]], "int32")
    ids = [check for check in verify(str(tmp_path / "pair"), Expected(), quiet) if check.name == "ids"]
    assert (
        ids[0].problem
        == "id -2 at document 0 (sequence 0, token 1), allowed are 0 and above; the largest is 1"
    )


def test_sequences_without_tokens_are_reported_and_no_error(tmp_path: Path) -> None:
    write_as_neox(tmp_path / "pair", [[[1, 9], []], [[]], [[2, 9]]], "uint16")
    expected = Expected(tokenizer=TOKENIZER)
    found = {check.name: check for check in verify(str(tmp_path / "pair"), expected, quiet)}
    assert failures(found) == {}
    assert found["lengths"].note == "4 sequences, 2 of them without tokens (first: sequence 1)"
    assert "2 of 2 documents" in found["eod"].note


def test_progress_is_told_every_few_seconds_and_ends_at_the_whole() -> None:
    now, lines = [0.0], list[str]()
    progress = ByteProgress(4_000_000, lines.append, clock=lambda: now[0])
    for _ in range(8):
        now[0] += 5.0
        progress.add(500_000)
    assert len(lines) == 4
    assert lines[1] == "read 50.0 % of 4.0 MB | 0.1 MB/s | elapsed 0:00:20, ETA 0:00:20"
    assert lines[-1].startswith("read 100.0 %")


def test_progress_counts_every_byte_that_is_read_once(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(ByteProgress, "add", lambda self, count: seen.append(count))
    checks(pair)
    read_once = 34 + 8  # the header, and the last bound
    assert sum(seen) == 26 + 2 * 142 - read_once


def test_an_added_manifest_says_what_can_be_known(tmp_path: Path) -> None:
    prefix = tmp_path / "pair"
    write_as_neox(prefix, DOCUMENTS, "int32")
    manifest = add_manifest(str(prefix), TOKENIZER, quiet)
    assert manifest == read_manifest(str(prefix))
    summary = check_indexed(str(prefix))
    assert (manifest.documents, manifest.sequences, manifest.tokens, manifest.dtype) == (5, 5, 13, "int32")
    assert (summary.documents, manifest.max_token_id, manifest.eod, manifest.vocab_size) == (5, 9, 9, 10)
    assert (manifest.append_eod, manifest.eod_in_text) == (True, 1)
    assert manifest.bin_sha256 == hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    assert manifest.idx_sha256 == hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
    assert (manifest.sources, manifest.bytes, manifest.json_key) == ((), 0, "")
    assert manifest.tool_version.endswith("added later")


def test_a_manifest_is_not_added_to_what_is_wrong(pair: Path) -> None:
    with pytest.raises(ConfigError, match="is there already; delete it first"):
        add_manifest(str(pair), TOKENIZER, quiet)
    manifest_path(str(pair)).unlink()
    with pytest.raises(
        ConfigError, match=r"not made with tokenizer 8: id 9 at document 0 .*, allowed are 0 to 8"
    ):
        add_manifest(str(pair), NullTokenizer(8), quiet)
    edit_index(pair, POINTERS + 8, "<q", 8)
    with pytest.raises(ConfigError, match="is damaged: pointers: FAILED: sequence 1"):
        add_manifest(str(pair), TOKENIZER, quiet)
    assert not manifest_path(str(pair)).exists()


def test_files_without_eod_get_a_manifest_that_says_so(tmp_path: Path) -> None:
    write_as_neox(tmp_path / "pair", [[[1, 9]], [[2]]], "uint16")
    manifest = add_manifest(str(tmp_path / "pair"), TOKENIZER, quiet)
    assert (manifest.append_eod, manifest.eod_in_text) == (False, 1)
