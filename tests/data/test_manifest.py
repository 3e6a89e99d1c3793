"""The manifest: what is written is what is read, and a foreign or stale one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_let.data.indexed import IndexedSummary
from megatron_let.data.manifest import (
    Manifest,
    SourceFile,
    manifest_path,
    read_manifest,
    require_manifest_of,
    write_manifest,
)
from megatron_let.errors import ConfigError

MANIFEST = Manifest(
    tokenizer_type="HuggingFaceTokenizer",
    tokenizer_name="/tokenizers/ünï",
    tokenizer_fingerprint="ab" * 32,
    vocab_size=400,
    eod=0,
    append_eod=True,
    json_key="text",
    dtype="uint16",
    max_token_id=399,
    documents=3,
    sequences=4,
    tokens=7,
    bytes=20,
    sources=(SourceFile("a.jsonl", 30), SourceFile("b.jsonl", 31)),
    skipped={"blank_line": 2},
    skipped_examples=("a.jsonl:4: blank_line",),
    tool_version="0.1.0",
)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    prefix = str(tmp_path / "data.v1")  # a dot in the name is not a suffix
    write_manifest(prefix, MANIFEST)
    assert manifest_path(prefix) == tmp_path / "data.v1.manifest.json"
    assert read_manifest(prefix) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["data.v1.manifest.json"]


def test_no_manifest_is_none(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path / "absent")) is None


def test_fields_of_a_later_release_are_passed_over(tmp_path: Path) -> None:
    prefix = str(tmp_path / "data")
    write_manifest(prefix, MANIFEST)
    path = manifest_path(prefix)
    content = json.loads(path.read_text())
    content["checksum"] = "0"
    content["sources"][0]["checksum"] = "0"
    path.write_text(json.dumps(content))
    assert read_manifest(prefix) == MANIFEST


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not a manifest"),
        ("{}", "not a manifest"),
        ('{"version": 1}', "not a whole manifest"),
        ('{"version": 2}', "has version 2"),
    ],
)
def test_what_is_not_a_manifest_is_named(tmp_path: Path, content: str, message: str) -> None:
    manifest_path(str(tmp_path / "data")).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_manifest(str(tmp_path / "data"))
    assert "data.manifest.json" in str(caught.value)


def test_a_manifest_of_an_earlier_pair_is_refused() -> None:
    summary = IndexedSummary(prefix="data", dtype="uint16", documents=3, sequences=4, tokens=7)
    require_manifest_of(MANIFEST, summary)
    for changed in (
        replace(summary, documents=4),
        replace(summary, tokens=8),
        replace(summary, dtype="int32"),
    ):
        with pytest.raises(ConfigError, match=r"data\.manifest\.json belongs to other files"):
            require_manifest_of(MANIFEST, changed)
