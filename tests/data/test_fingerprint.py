"""Fingerprints: equal for one vocabulary however loaded, different for any change that matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.fingerprint import describe_difference, fingerprint_of
from megatron_let.data.tokenizer_facts import facts_of_directory
from megatron_let.errors import ConfigError

PINNED = "a5e3eb6fec2dafdfa0f003749eeac3f35f2327ec1be9cece22a7e1dae59d81a1"
MAP = {"a": 0, "b": 1, "<eos>": 2}


def fingerprint_of_directory(path: Path) -> str | None:
    facts = facts_of_directory(path)
    return None if facts is None else facts.fingerprint


def test_the_order_of_the_maps_does_not_matter() -> None:
    assert fingerprint_of(MAP, {"eos": 2, "bos": 0}) == fingerprint_of(
        dict(reversed(MAP.items())), {"bos": 0, "eos": 2}
    )
    assert fingerprint_of(MAP, {"eos": 2, "bos": None}) == fingerprint_of(MAP, {"eos": 2})


def test_the_value_is_stable_over_releases() -> None:
    assert fingerprint_of(MAP, {"eos": 2}) == PINNED


@pytest.mark.parametrize(
    ("token_to_id", "special_ids"),
    [
        ({"a": 1, "b": 0, "<eos>": 2}, {"eos": 2}),
        ({"a": 0, "b": 1, "<EOS>": 2}, {"eos": 2}),
        ({**MAP, "c": 3}, {"eos": 2}),
        ({"a": 0, "<eos>": 2}, {"eos": 2}),
        (MAP, {"eos": 1}),
        (MAP, {"bos": 2}),
        (MAP, {"eos": 2, "bos": 1}),
        (MAP, {}),
    ],
)
def test_every_change_of_a_token_or_a_special_id_shows(
    token_to_id: dict[str, int], special_ids: dict[str, int | None]
) -> None:
    assert fingerprint_of(token_to_id, special_ids) != fingerprint_of(MAP, {"eos": 2})


@given(st.dictionaries(st.text(st.characters(codec=None)), st.integers(0, 50), max_size=5))
@settings(max_examples=30, deadline=None)
def test_any_string_can_be_a_token(token_to_id: dict[str, int]) -> None:
    fingerprint = fingerprint_of(token_to_id, {})
    assert len(fingerprint) == 64
    assert fingerprint_of({**token_to_id, "another token": 99}, {}) != fingerprint


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "mistral"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_beside_the_tokenizer_does_not_change_it(
    tokenizer_directory: Path, tmp_path: Path, model_type: str
) -> None:
    copy = tmp_path / model_type
    shutil.copytree(tokenizer_directory, copy)
    (copy / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400}))
    assert fingerprint_of_directory(copy) == fingerprint_of_directory(tokenizer_directory)


def test_a_pad_token_from_the_vocabulary_does_not_change_it_and_another_eos_does(
    tokenizer_directory: Path, tmp_path: Path
) -> None:
    values = []
    for name, changes in (
        ("pad", {"pad_token": "!"}),
        ("eos", {"eos_token": "!"}),
        ("bos", {"bos_token": "!"}),
    ):
        copy = tmp_path / name
        shutil.copytree(tokenizer_directory, copy)
        config = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
        values.append(fingerprint_of_directory(copy))
    assert values[0] == fingerprint_of_directory(tokenizer_directory)
    assert len(set(values)) == 3


def test_a_directory_without_tokenizer_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint_of_directory(tmp_path) is None
    assert fingerprint_of_directory(tmp_path / "absent") is None


def test_a_directory_with_a_broken_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"cut off')
    with pytest.raises(ConfigError, match="cannot load the tokenizer in"):
        fingerprint_of_directory(tmp_path)


def test_a_difference_is_described_by_its_first_token() -> None:
    assert describe_difference(MAP, dict(MAP)) == ""
    swapped = {"b": 0, "a": 1, "<eos>": 2, "new": 3}
    assert describe_difference(MAP, swapped) == (
        "other ids: 2 (first 'a': 0 and 1); only in the second: 1 (such as 'new')"
    )
    assert describe_difference(MAP, {"a": 0, "b": 1}) == "only in the first: 1 (such as '<eos>')"
