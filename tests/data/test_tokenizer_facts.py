"""Two tokenizers of one vocabulary are told apart by what they make of texts, and the difference has its words."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data.batch_encoders import BackendEncoder
from megatron_let.data.encoding_fingerprint import encode_otherwise, encoding_fingerprint_of, encoding_texts
from megatron_let.data.tokenizer_facts import TokenizerFacts, difference_in_words, special_ids_in_words
from megatron_let.data.tokenizers import HuggingFaceTokenizer, build_tokenizer
from tests.data.conftest import write_tokenizer_directory

PINNED = ("886be4e9c9993596", "18de6b5d71f5141f")


def _facts(backend: Any) -> TokenizerFacts:
    return TokenizerFacts(backend.get_vocab(), {"eos": 0, "bos": 0}, BackendEncoder(backend))


def _altered(backend: Any, change: Callable[[dict[str, Any]], object]) -> Any:
    content = json.loads(backend.to_str())
    change(content)
    return type(backend).from_str(json.dumps(content))


def _lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def _split_numerals(content: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}


def _prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


CHANGES = {
    "the last merge is gone": lambda content: content["model"]["merges"].pop(),
    "a merge in the middle is gone": lambda content: content["model"]["merges"].pop(60),
    "lowercase": _lowercase,
    "numerals apart": _split_numerals,
    "a space in front": _prefix_space,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_that_the_vocabulary_does_not_show_is_seen(
    backend: Any, change: Callable[[dict[str, Any]], object]
) -> None:
    mine, theirs = _facts(backend), _facts(_altered(backend, change))
    assert mine.fingerprint == theirs.fingerprint
    assert encode_otherwise(mine.encoding_fingerprint, theirs.encoding_fingerprint)
    assert difference_in_words(mine, theirs).startswith("one vocabulary, other ids for a text: ")
    assert not encode_otherwise(mine.encoding_fingerprint, _facts(backend).encoding_fingerprint)


def test_special_tokens_as_text_are_no_other_encoding(tokenizer_directory: Path) -> None:
    plain, as_text = (
        HuggingFaceTokenizer(str(tokenizer_directory), encode_special_tokens=wanted)
        for wanted in (False, True)
    )
    assert plain.encoding_fingerprint == as_text.encoding_fingerprint is not None


def test_a_model_file_its_directory_and_gpt2s_files_encode_alike(
    backend: Any, sentencepiece_model: Path, tmp_path: Path
) -> None:
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    plain = build_tokenizer(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model))
    assert HuggingFaceTokenizer(str(tmp_path)).encoding_fingerprint == plain.encoding_fingerprint
    files = tmp_path / "gpt2"
    files.mkdir()
    backend.model.save(str(files))
    write_tokenizer_directory(files, backend)
    gpt2 = build_tokenizer(
        tokenizer_type="GPT2BPETokenizer",
        vocab_file=str(files / "vocab.json"),
        merge_file=str(files / "merges.txt"),
    )
    assert gpt2.encoding_fingerprint == HuggingFaceTokenizer(str(files)).encoding_fingerprint
    assert build_tokenizer(tokenizer_type="NullTokenizer", vocab_size=5).encoding_fingerprint is None


@pytest.mark.parametrize(("space", "digest"), [("\u0120", PINNED[0]), ("\u2581", PINNED[1])])
def test_the_texts_are_the_same_in_every_release(space: str, digest: str) -> None:
    """Manifests and checkpoints hold what follows from them: other texts need another mark."""
    token_to_id = {f"{space}word{index}": index for index in range(100)} | {"<s>": 100, "\u00c3\u00a9": 101}
    texts = encoding_texts(token_to_id)
    assert hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16] == digest


def test_a_tokenizer_that_cannot_encode_every_text_has_none() -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    assert encoding_fingerprint_of(BackendEncoder(backend), {"a": 0}) is None


def test_values_of_other_marks_and_unknown_ones_are_not_compared() -> None:
    assert encode_otherwise("1:aa", "1:bb")
    for mine, theirs in (("1:aa", "1:aa"), ("1:aa", "2:bb"), (None, "1:aa"), ("1:aa", None)):
        assert not encode_otherwise(mine, theirs)


def test_every_token_has_its_place_in_the_texts(backend: Any) -> None:
    texts = "\n".join(encoding_texts(backend.get_vocab()))
    words = [backend.decode([index]) for index in range(1, backend.get_vocab_size())]
    assert all(word in texts for word in words if "\ufffd" not in word)
    assert "<|endoftext|>" not in texts


def test_only_what_differs_is_named(backend: Any) -> None:
    assert special_ids_in_words({"eos": 0, "bos": 0}, {"eos": 2, "bos": 2}) == "only eos differs: 0 and 2"
    assert special_ids_in_words({"eos": 0, "bos": 1}, {"eos": 2, "bos": 1}) == "only eos differs: 0 and 2"
    assert special_ids_in_words({"eos": 0, "bos": 1}, {"eos": 2, "bos": 3}) == (
        "only bos and eos differ: 1 and 3, 0 and 2"
    )
    mine = _facts(backend)
    theirs = TokenizerFacts(mine.token_to_id, {"eos": 2, "bos": 2}, mine.encoder)
    assert difference_in_words(mine, theirs) == "only eos differs: 0 and 2"
    assert difference_in_words(mine, mine) == ""
