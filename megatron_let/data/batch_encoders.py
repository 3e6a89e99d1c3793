"""The part of a tokenizer that turns texts into ids: picklable, and light enough to start a worker process with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class BatchEncoder(ABC):
    """Turns texts into ids and nothing else: small enough to send to a worker process."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without bos or eod. Raises ValueError for a text that has none."""


class BackendEncoder(BatchEncoder):
    """Encodes with a `tokenizers.Tokenizer`: the Rust side of a fast tokenizer, without transformers."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See BatchEncoder."""
        # The fast variant leaves out character offsets.
        return [item.ids for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def __getstate__(self) -> tuple[str, bool]:
        """Pickle as JSON, which leaves out the one setting that is kept beside it."""
        return self.backend.to_str(), self.backend.encode_special_tokens

    def __setstate__(self, state: tuple[str, bool]) -> None:
        """See __getstate__."""
        from tokenizers import Tokenizer as Backend

        self.backend = Backend.from_str(state[0])
        self.backend.encode_special_tokens = state[1]


class SlowHuggingFaceEncoder(BatchEncoder):
    """Encodes with a transformers tokenizer written in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See BatchEncoder."""
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]


class SentencePieceEncoder(BatchEncoder):
    """Encodes with a SentencePiece model given as bytes; the processor is made again after unpickling."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.processor = _sentencepiece_processor(model)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See BatchEncoder."""
        return [self.processor.encode_as_ids(text) for text in texts]

    def __reduce__(self) -> tuple[type[SentencePieceEncoder], tuple[bytes]]:
        """Send the model's bytes only."""
        return SentencePieceEncoder, (self.model,)


class NullEncoder(BatchEncoder):
    """Reads ids written as decimal numbers between single spaces."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See BatchEncoder."""
        batch = [[int(number) for number in text.split(" ")] for text in texts]
        if any(not 0 <= token_id < self.vocab_size for ids in batch for token_id in ids):
            raise ValueError(f"a token id is outside 0..{self.vocab_size - 1}")
        return batch


def _sentencepiece_processor(model: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)
