"""Encoders: flat arrays of ids that are those of the library underneath."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.batch_encoders import (
    BackendEncoder,
    EncodedTexts,
    NullEncoder,
    SentencePieceEncoder,
    SlowHuggingFaceEncoder,
    join_encoded,
    join_ids,
)

TEXTS = ["the quick fox", "", "日本語 🤖 <|endoftext|>", "a"]


@given(batch=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=4), max_size=4))
@settings(max_examples=50, deadline=None)
def test_lists_of_ids_come_back_from_the_flat_form(batch: list[list[int]]) -> None:
    encoded = join_ids(batch)
    assert encoded.to_lists() == batch
    assert join_encoded([encoded, encoded]).to_lists() == batch * 2


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_an_id_that_32_bits_do_not_hold_is_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        join_ids([[1], [token_id]])


def test_lengths_must_add_up() -> None:
    with pytest.raises(AssertionError, match="add up"):
        EncodedTexts(np.arange(3), np.array([1, 1]))


def test_nothing_to_encode_is_no_error(backend: Any) -> None:
    assert BackendEncoder(backend).encode([]).to_lists() == []
    assert join_encoded([]).to_lists() == []


def test_ids_are_the_librarys(backend: Any, sentencepiece_model: Path) -> None:
    expected = [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert BackendEncoder(backend).encode(TEXTS).to_lists() == expected
    encoder = SentencePieceEncoder(sentencepiece_model.read_bytes())
    assert encoder.encode(TEXTS).to_lists() == [encoder.processor.encode_as_ids(text) for text in TEXTS]
    assert NullEncoder(10).encode(["1 2", "3"]).to_lists() == [[1, 2], [3]]


def test_a_pickled_backend_keeps_how_it_takes_special_tokens(backend: Any) -> None:
    for as_text in (True, False):
        encoder = pickle.loads(pickle.dumps(BackendEncoder(backend)))
        encoder.backend.encode_special_tokens = as_text
        travelled = pickle.loads(pickle.dumps(encoder))
        ids = travelled.encode(["<|endoftext|>"]).to_lists()[0]
        assert (ids == [0]) is not as_text


def test_a_python_tokenizer_is_told_by_its_vocabulary_settings_and_files(tmp_path: Path) -> None:
    def definition(vocab: dict[str, int], **settings: Any) -> bytes:
        tokenizer = SimpleNamespace(get_vocab=lambda: vocab, init_kwargs=settings)
        return SlowHuggingFaceEncoder(tokenizer).definition()

    merges, copy, other = (tmp_path / name for name in ("merges.txt", "copy.txt", "other.txt"))
    for path in (merges, copy):
        path.write_text("a b")
    other.write_text("b a")
    usual = definition({"a": 0}, merges_file=str(merges), lower=True, name_or_path="here")
    assert usual == definition({"a": 0}, lower=True, merges_file=str(copy), name_or_path="there")
    assert usual != definition({"a": 1}, merges_file=str(merges), lower=True)
    assert usual != definition({"a": 0}, merges_file=str(other), lower=True)
    assert usual != definition({"a": 0}, merges_file=str(merges), lower=False)
