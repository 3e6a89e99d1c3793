"""What transformers makes of a directory is held against the directory's own files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data.batch_encoders import BackendEncoder, SentencePieceEncoder
from megatron_let.data.fast_encoder import choose_encoder
from megatron_let.data.tokenizers import HuggingFaceTokenizer
from megatron_let.errors import ConfigError
from megatron_let.optional import has_gigatoken
from tests.data.conftest import SENTENCES, write_tokenizer_directory
from tests.data.real_tokenizers import file_of_package

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Indents and runs of spaces, spaces at both ends, lines, characters that the vocabulary has to spell in bytes.
TEXTS = [*SENTENCES, "Hello    world", "  a", "a ", "\tb\n\n    c", "\u2581", "12 \U0001f680", ""]


@pytest.fixture(autouse=True)
def _through_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_let"), "propagate", True)


def _directory(model: Path, path: Path, config: dict[str, Any] | None) -> str:
    path.mkdir()
    shutil.copy(model, path / "tokenizer.model")
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("config", [None, LLAMA], ids=["alone", "LlamaTokenizer"])
def test_a_sentencepiece_model_without_tokenizer_json_gives_its_own_ids(
    sentencepiece_model: Path, tmp_path: Path, config: dict[str, Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = HuggingFaceTokenizer(_directory(sentencepiece_model, tmp_path / "llama", config))
    reference = SentencePieceEncoder(sentencepiece_model.read_bytes())
    assert [tokenizer.tokenize(text) for text in TEXTS] == reference.encode(TEXTS).to_lists()
    (record,) = caplog.records
    assert "transformers converts tokenizer.model to a tokenizer with other ids" in record.message
    assert "the file itself encodes" in record.message


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_own_file_gives_its_own_ids(name: str, tmp_path: Path) -> None:
    model = file_of_package("mistral_common", f"data/{name}")
    tokenizer = HuggingFaceTokenizer(_directory(model, tmp_path / "mistral", LLAMA))
    reference = SentencePieceEncoder(model.read_bytes())
    assert [tokenizer.tokenize(text) for text in TEXTS] == reference.encode(TEXTS).to_lists()
    if name.endswith("v1"):
        assert tokenizer.tokenize("Hello    world") == [22557, 2287, 1526]


@pytest.mark.skipif(not has_gigatoken(), reason="gigatoken is not installed")
def test_the_fast_encoder_is_held_against_the_model_file(sentencepiece_model: Path, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(_directory(sentencepiece_model, tmp_path / "llama", LLAMA))
    encoder, _ = choose_encoder(tokenizer.batch_encoder(), TEXTS, "auto")
    reference = SentencePieceEncoder(sentencepiece_model.read_bytes())
    assert encoder.encode(TEXTS).to_lists() == reference.encode(TEXTS).to_lists()


def test_special_tokens_may_be_asked_for_as_text(sentencepiece_model: Path, tmp_path: Path) -> None:
    path = _directory(sentencepiece_model, tmp_path / "llama", LLAMA)
    tokenizer = HuggingFaceTokenizer(path, encode_special_tokens=True)
    assert tokenizer.eod not in tokenizer.tokenize("a </s> b")


@pytest.mark.parametrize(("is_special", "is_refused"), [(True, False), (False, True)])
def test_words_that_were_added_to_the_model_are_not_lost_without_a_word(
    sentencepiece_model: Path, tmp_path: Path, is_special: bool, is_refused: bool
) -> None:
    reference = SentencePieceEncoder(sentencepiece_model.read_bytes())
    added = {"content": "<new>", "special": is_special, "lstrip": False, "rstrip": False}
    added |= {"normalized": False, "single_word": False}
    new_id = reference.processor.get_piece_size()
    config = {**LLAMA, "added_tokens_decoder": {str(new_id): added}}
    path = _directory(sentencepiece_model, tmp_path / "llama", config)
    if not is_refused:
        assert HuggingFaceTokenizer(path).vocab_size == new_id + 1
        return
    with pytest.raises(ConfigError, match=r"tokens were added to it or numbered anew; give a directory with"):
        HuggingFaceTokenizer(path)


def test_what_a_class_leaves_out_of_tokenizer_json_is_done_all_the_same(
    backend: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with SmolLM2's, whose numerals stand alone and which calls itself a GPT2Tokenizer."""
    from tokenizers import pre_tokenizers

    stated = type(backend).from_str(backend.to_str())
    stated.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    write_tokenizer_directory(tmp_path, stated, tokenizer_class="GPT2Tokenizer", pad_token="<|pad|>")
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    texts = [*TEXTS, "a  1", "a<|endoftext|>b"]
    assert [tokenizer.tokenize(text) for text in texts] == BackendEncoder(stated).encode(texts).to_lists()
    assert tokenizer.tokenize("a<|pad|>")[-1] == tokenizer.pad  # known to tokenizer_config.json alone
    (record,) = caplog.records
    assert "transformers' GPT2Tokenizer does not do what tokenizer.json says" in record.message


def test_a_definition_that_is_followed_is_no_matter_for_words(
    backend: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("GPT2Tokenizer", "PreTrainedTokenizerFast")):
        directory = tmp_path / str(number)
        directory.mkdir()
        write_tokenizer_directory(directory, backend, tokenizer_class=name)
        HuggingFaceTokenizer(str(directory))
    assert not caplog.records
