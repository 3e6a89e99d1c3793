"""The tokenizer of a data set against another: told in words while it can be loaded, by what is recorded afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data.manifest import Manifest
from megatron_let.data.recorded_tokenizer import difference_from_manifest, difference_of_manifests
from megatron_let.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from tests.data.conftest import write_tokenizer_directory
from tests.data.test_manifest import MANIFEST


@pytest.fixture
def tokenizers(backend: Any, tmp_path: Path) -> dict[str, Tokenizer]:
    """Return tokenizers of one vocabulary: the usual one, one with another eos, and one without its last merge."""
    content = json.loads(backend.to_str())
    content["model"]["merges"].pop()
    fewer = type(backend).from_str(json.dumps(content))
    for name, of, eos in (
        ("usual", backend, "<|endoftext|>"),
        ("eos", backend, "!"),
        ("fewer", fewer, "<|endoftext|>"),
    ):
        (tmp_path / name).mkdir()
        write_tokenizer_directory(tmp_path / name, of, eos_token=eos)
    return {name: HuggingFaceTokenizer(str(tmp_path / name)) for name in ("usual", "eos", "fewer")}


def _manifest(tokenizer: Tokenizer) -> Manifest:
    return replace(
        MANIFEST,
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        encoding_fingerprint=tokenizer.encoding_fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
    )


def test_the_same_tokenizer_and_an_unknown_one_are_no_difference(tokenizers: dict[str, Tokenizer]) -> None:
    usual = _manifest(tokenizers["usual"])
    assert difference_from_manifest(tokenizers["usual"], usual) == ""
    assert difference_of_manifests(usual, usual) == ""
    assert difference_from_manifest(tokenizers["usual"], replace(usual, tokenizer_fingerprint=None)) == ""
    unknown = replace(_manifest(tokenizers["fewer"]), encoding_fingerprint=None)
    assert difference_from_manifest(tokenizers["usual"], unknown) == ""
    assert difference_of_manifests(usual, unknown) == ""


@pytest.mark.parametrize(
    ("other", "words"),
    [("eos", "only eos differs: 0 and {eos}"), ("fewer", "one vocabulary, other ids for a text: ")],
)
def test_what_differs_is_said(tokenizers: dict[str, Tokenizer], other: str, words: str) -> None:
    mine, theirs = _manifest(tokenizers["usual"]), _manifest(tokenizers[other])
    words = words.format(eos=tokenizers["eos"].eod)
    assert words in difference_of_manifests(mine, theirs)
    found = difference_from_manifest(tokenizers["usual"], theirs)
    assert words in found
    assert found.startswith(f"the data were made with {theirs.tokenizer_name} (")


def test_a_tokenizer_that_is_gone_is_told_by_what_is_recorded(tokenizers: dict[str, Tokenizer]) -> None:
    usual, eos, fewer = (_manifest(tokenizers[name]) for name in ("usual", "eos", "fewer"))
    for tokenizer in (tokenizers["eos"], tokenizers["fewer"]):
        shutil.rmtree(tokenizer.name)
    assert f"only eos differs: 0 and {eos.eod}" in difference_from_manifest(tokenizers["usual"], eos)
    assert f"eod 0 and {eos.eod}" in difference_of_manifests(usual, eos)
    assert ": encoding_fingerprint " in difference_of_manifests(usual, fewer)
    assert tokenizers["fewer"].name in difference_from_manifest(tokenizers["usual"], fewer)


def test_another_tokenizer_under_the_old_name_is_not_taken_for_the_recorded_one(
    tokenizers: dict[str, Tokenizer],
) -> None:
    usual, fewer = _manifest(tokenizers["usual"]), _manifest(tokenizers["fewer"])
    moved = replace(fewer, tokenizer_name=usual.tokenizer_name)
    assert ": encoding_fingerprint " in difference_of_manifests(usual, moved)
