"""Runs of preprocessing in this process: numbers as text, so that ids can be read off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_let.data.indexed import read_document
from megatron_let.data.manifest import Manifest
from megatron_let.data.preprocess import PreprocessSettings, preprocess
from megatron_let.data.tokenizers import NullTokenizer, Tokenizer

WriteJsonl = Callable[..., str]
NUMBERS = NullTokenizer(1000)
PROGRAM = Path(__file__).with_name("preprocess_program.py")


def run(
    prefix: Path, inputs: Sequence[str], tokenizer: Tokenizer = NUMBERS, **changes: Any
) -> dict[str, Manifest]:
    chosen: dict[str, Any] = {"append_eod": True, "max_error_fraction": 1.0, **changes}
    return preprocess(PreprocessSettings(tuple(inputs), str(prefix), **chosen), tokenizer, lambda line: None)


def one(prefix: Path, inputs: Sequence[str], tokenizer: Tokenizer = NUMBERS, **changes: Any) -> Manifest:
    (manifest,) = run(prefix, inputs, tokenizer, **changes).values()
    assert manifest.records == manifest.documents + sum(manifest.skipped.values())
    return manifest


def documents(prefix: Path, count: int) -> list[list[int]]:
    return [read_document(f"{prefix}_text_document", index).tolist() for index in range(count)]


def good(count: int) -> list[dict[str, str]]:
    return [{"text": str(number % 1000)} for number in range(count)]
