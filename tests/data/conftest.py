"""Tiny tokenizers made on the spot, and JSON lines files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.data.stopped_runs import lines

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "ünïcode: 日本語 and 🤖 and שלום",
    "def add(a, b):\n    return a + b\n",
)


@pytest.fixture(scope="session")
def backend() -> Any:
    """Return a byte-level BPE `tokenizers.Tokenizer` of a few hundred ids, <|endoftext|> first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence for sentence in SENTENCES for _ in range(5)], trainer=trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(backend: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face tokenizer directory of `backend`."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer_directory(directory, backend)
    return directory


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SentencePiece .model file with byte fallback, as LLaMA's."""
    from sentencepiece import SentencePieceTrainer

    directory = tmp_path_factory.mktemp("sentencepiece")
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5),
        model_prefix=str(directory / "tiny"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return directory / "tiny.model"


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes records (or raw lines, as bytes) to a file and returns its path."""

    def write(records: Sequence[Any], name: str = "input.jsonl") -> str:
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


def write_tokenizer_directory(directory: Path, backend: Any, **settings: Any) -> None:
    """Write `backend` as a Hugging Face directory, with `settings` over the usual ones."""
    backend.save(str(directory / "tokenizer.json"))
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**usual, **settings}))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return three files: plain, gzip, zstd."""
    directory = tmp_path_factory.mktemp("inputs")
    content = [b"\n".join(lines(count)) + b"\n" for count in (900, 700, 800)]
    (directory / "a.jsonl").write_bytes(content[0])
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(content[1]))
    (directory / "c.jsonl.zst").write_bytes(zstandard.compress(content[2]))
    return sorted(str(path) for path in directory.iterdir())
