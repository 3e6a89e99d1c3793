"""Documents end in the tokenizer's eos, in a token of the user's choice, or in nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data.document_end import choose_eod
from megatron_let.data.manifest import Manifest, read_manifest
from megatron_let.data.tokenizers import NO_EOD, NullTokenizer, build_tokenizer
from megatron_let.data.verify import Expected, verify
from megatron_let.errors import ConfigError
from tests.data.conftest import write_tokenizer_directory
from tests.data.runs import WriteJsonl, documents

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture
def without_eos(backend: Any, tmp_path: Path) -> Path:
    """Return a tokenizer directory that names no eos; <|endoftext|> is in its vocabulary."""
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    write_tokenizer_directory(directory, backend, eos_token=None)
    return directory


def preprocess(
    tmp_path: Path, tokenizer: Path, *flags: str, kind: str = "HuggingFaceTokenizer"
) -> Manifest | int:
    """Run the program; return the manifest it wrote, or its exit status."""
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    places = ("--input", f"{tmp_path}/input.jsonl", "--output-prefix", f"{tmp_path}/out")
    status: int = module.main(
        [*places, "--tokenizer-type", kind, "--tokenizer-model", str(tokenizer), *flags]
    )
    manifest = read_manifest(f"{tmp_path}/out_text_document")
    return status if manifest is None else manifest


def test_a_tokenizer_without_eos_is_enough_where_no_document_gets_one(
    without_eos: Path, write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl([{"text": "the fox"}, {"text": "of<|endoftext|>"}])
    assert preprocess(tmp_path, without_eos, "--append-eod") == 2
    assert "has no eos token; name the token that ends documents by --eod-token" in capsys.readouterr().err
    manifest = preprocess(tmp_path, without_eos)
    assert isinstance(manifest, Manifest)
    assert (manifest.documents, manifest.eod, manifest.append_eod, manifest.eod_in_text) == (
        2,
        NO_EOD,
        False,
        0,
    )
    with pytest.raises(ConfigError, match="has no eos token"):  # training's way to build it
        build_tokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(without_eos))


def test_the_token_that_is_named_ends_documents(
    without_eos: Path, write_jsonl: WriteJsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl([{"text": "the fox"}, {"text": "of<|endoftext|>"}])
    assert preprocess(tmp_path, without_eos, "--append-eod", "--eod-token", "<end>") == 2
    assert "--eod-token <end>: tokenizer" in capsys.readouterr().err
    manifest = preprocess(tmp_path, without_eos, "--append-eod", "--eod-token", "<|endoftext|>")
    assert isinstance(manifest, Manifest)
    assert (manifest.eod, manifest.eod_in_text) == (0, 1)
    assert [ids[-1] for ids in documents(tmp_path / "out", 2)] == [0, 0]
    with_other_eod = build_tokenizer(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(without_eos), needs_eod=False
    )
    checks = verify(f"{tmp_path}/out_text_document", Expected(manifest, with_other_eod), print)
    assert not [check for check in checks if check.problem is not None]


def test_pieces_of_sentencepiece_and_no_tokens_of_numbers(sentencepiece_model: Path) -> None:
    tokenizer = build_tokenizer(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model)
    )
    encoder = tokenizer.batch_encoder()
    assert [encoder.token_id(piece) for piece in ("<unk>", "<s>", "</s>", "none such")] == [0, 1, 2, None]
    choose_eod(tokenizer, "<s>", append_eod=True)
    assert tokenizer.eod == 1
    with pytest.raises(ConfigError, match="--eod-token 7: tokenizer 9 has no such token"):
        choose_eod(NullTokenizer(9), "7", append_eod=True)
