"""Spoilt directories of Hugging Face: config.json, weights, index, tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_let.data.tokenizers import build_tokenizer
from megatron_let.let import load_hf_teacher
from megatron_let.let.hf_files import INDEX_FILE, SINGLE_FILE
from megatron_let.let.hf_teacher import check_hf_teacher
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from tests.fuzz.kit import CHANGES, EDITS, Changes, Edits, change, fuzz, said, spoil, to_json, with_file
from tests.training.bad_input import write_word_tokenizer


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a whole tiny teacher with its tokenizer."""
    return write_teacher(tmp_path_factory.mktemp("teachers") / "honest")


def write_teacher(directory: Path) -> Path:
    """Write a whole tiny teacher with its tokenizer; return its directory."""
    write_tiny_teacher("llama", directory)
    write_word_tokenizer(directory, [f"w{index}" for index in range(66)] + ["<eod>"])
    return directory


@pytest.fixture(scope="module")
def sharded(honest: Path) -> Path:
    """Return the same with an index and two files of weights."""
    return write_sharded(honest)


def write_sharded(honest: Path) -> Path:
    """Write a copy of a teacher with an index and two files of weights; return its directory."""
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(honest, honest.parent / "sharded"))
    weights = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    places = {name: f"{'ab'[number % 2]}.safetensors" for number, name in enumerate(sorted(weights))}
    for file in ("a.safetensors", "b.safetensors"):
        some = {name: weights[name] for name, place in places.items() if place == file}
        save_file(some, directory / file, metadata={"format": "pt"})
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return directory


def load(directory: Path) -> str | None:
    """Load a teacher; return the line with which it is refused."""

    def use() -> None:
        config = check_hf_teacher(directory, layer=None)
        assert int(config.vocab_size) > 0
        load_hf_teacher(directory, layer=None, dtype=torch.float32, device="cpu")

    return said(use, directory)


@fuzz(60)
@given(changes=CHANGES)
def test_a_config_of_other_values_is_used_or_refused(changes: Changes, honest: Path) -> None:
    config = json.loads((honest / "config.json").read_text())
    with_file(honest, "config.json", to_json(change(config, changes)), load)


@fuzz(60)
@given(edits=EDITS)
def test_a_config_of_other_bytes_is_used_or_refused(edits: Edits, honest: Path) -> None:
    with_file(honest, "config.json", spoil((honest / "config.json").read_bytes(), edits), load)


@fuzz(40)
@given(edits=EDITS, in_header=st.booleans())
def test_spoilt_weights_are_used_or_refused(edits: Edits, in_header: bool, honest: Path) -> None:
    data = (honest / SINGLE_FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little") if in_header else len(data)
    with_file(honest, SINGLE_FILE, spoil(data[:end], edits) + data[end:], load)


@fuzz(60)
@given(changes=CHANGES)
def test_a_header_of_weights_of_other_values_is_used_or_refused(changes: Changes, honest: Path) -> None:
    data = (honest / SINGLE_FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = to_json(change(json.loads(data[8:end]), changes))
    with_file(honest, SINGLE_FILE, len(header).to_bytes(8, "little") + header + data[end:], load)


@fuzz(40)
@given(changes=CHANGES)
def test_an_index_of_weights_of_other_values_is_used_or_refused(changes: Changes, sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    with_file(sharded, INDEX_FILE, to_json(change(index, changes)), load)


def tokenize(directory: Path) -> str | None:
    """Read a tokenizer and use it; return the line with which it is refused."""

    def use() -> None:
        tokenizer = build_tokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(directory))
        assert tokenizer.vocab_size < 1 << 20
        json.dumps(tokenizer.unique_identifiers)

    return said(use, directory)


@fuzz(60)
@given(changes=CHANGES, name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_a_tokenizer_of_other_values_is_used_or_refused(changes: Changes, name: str, honest: Path) -> None:
    with_file(honest, name, to_json(change(json.loads((honest / name).read_text()), changes)), tokenize)


@fuzz(60)
@given(edits=EDITS, name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_a_tokenizer_of_other_bytes_is_used_or_refused(edits: Edits, name: str, honest: Path) -> None:
    with_file(honest, name, spoil((honest / name).read_bytes(), edits), tokenize)


def test_the_honest_directories_are_used(honest: Path, sharded: Path) -> None:
    assert [load(honest), load(sharded), tokenize(honest)] == [None, None, None]


LARGER = "has a config.json of a larger model than its weights"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hidden_size": 10**9}, LARGER),
        ({"num_hidden_layers": 10**9, "layer_types": None}, LARGER),
        ({"vocab_size": 10**12}, LARGER),
        ({"intermediate_size": 10**12}, LARGER),
        ({"num_attention_heads": 3 * 10**8, "hidden_size": 3 * 10**8}, LARGER),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"model_type": "of-no-known-kind"}, "config.json"),
        ({"transformers_weights": "pytorch_model.bin"}, "names a weight file of its own"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "--let-trust-remote-code"),
    ],
)
def test_a_config_of_what_is_not_there(values: dict[str, Any], expected: str, honest: Path) -> None:
    config = {**json.loads((honest / "config.json").read_text()), **values}
    message = with_file(honest, "config.json", to_json(config), load)
    assert message is not None
    assert expected in message


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, 1 << 32, 0])
def test_weights_with_a_header_of_any_length(length: int, honest: Path) -> None:
    data = (honest / SINGLE_FILE).read_bytes()
    message = with_file(honest, SINGLE_FILE, length.to_bytes(8, "little") + data[8:], load)
    assert message is not None
    assert "has a damaged or cut-off model.safetensors" in message


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0.safetensors", "../a.safetensors", 5])
def test_an_index_with_names_of_no_file(name: Any, sharded: Path) -> None:
    index = {"weight_map": {"embed": name}}
    message = with_file(sharded, INDEX_FILE, json.dumps(index).encode(), load)
    assert message is not None
    assert "only .safetensors files of its own directory are loaded" in message


def test_a_tokenizer_of_billions_of_ids(honest: Path) -> None:
    content = json.loads((honest / "tokenizer.json").read_text())
    content["model"]["vocab"]["w5"] = 4_000_000_000
    message = with_file(honest, "tokenizer.json", to_json(content), tokenize)
    assert message is not None
    assert "gives id 4000000000 to a token and has 67 tokens" in message
