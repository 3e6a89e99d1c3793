"""The part of a tokenizer that turns texts into ids: picklable, and light enough to start a worker process with."""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_let.data.sentencepiece_model import is_unigram
from megatron_let.regular_files import read_bytes


@dataclass(frozen=True)
class EncodedTexts:
    """The ids of several texts, back to back."""

    ids: npt.NDArray[np.integer[Any]]
    """[tokens], of any integer type that holds them."""
    lengths: npt.NDArray[np.int64]
    """[texts], in tokens; a text without tokens has 0."""

    def __post_init__(self) -> None:
        assert int(self.lengths.sum()) == len(self.ids), "lengths do not add up to the ids"

    def to_lists(self) -> list[list[int]]:
        """Return the ids of each text as a list."""
        ends = np.cumsum(self.lengths).tolist()
        return [self.ids[start:end].tolist() for start, end in zip([0, *ends[:-1]], ends, strict=False)]


class BatchEncoder(ABC):
    """Turns texts into ids and nothing else: small enough to send to a worker process."""

    is_local: bool
    """What far-away text holds cannot change an id, so a long text may be encoded in pieces (see long_texts.py)."""
    separator = ""
    """Where this stands a text may be cut, and this left out; empty if the places have to be tried."""
    max_whole_bytes = 1 << 21
    """Longest text, in UTF-8, that is encoded whole where it cannot be cut: half a gigabyte in `tokenizers`, which keeps more
    than 200 bytes for each byte that is a token."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Return the ids of each text, without bos or eod. Raises ValueError for a text that has none."""

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary, None where there is no such token."""
        return None

    def definition(self) -> bytes:
        """Return all that decides over the ids: the same bytes in every process."""
        return pickle.dumps(self)


class BackendEncoder(BatchEncoder):
    """Encodes with a `tokenizers.Tokenizer`: the Rust side of a fast tokenizer, without transformers."""

    is_local = True

    def __init__(self, backend: Any) -> None:
        self._take(backend)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """See BatchEncoder."""
        # The fast variant leaves out character offsets.
        batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return join_ids(item.ids for item in batch)

    def token_id(self, token: str) -> int | None:
        """See BatchEncoder."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def __getstate__(self) -> tuple[str, bool]:
        """Pickle as JSON, which leaves out the one setting that is kept beside it."""
        return self.backend.to_str(), self.backend.encode_special_tokens

    def __setstate__(self, state: tuple[str, bool]) -> None:
        """See __getstate__."""
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(state[0])
        backend.encode_special_tokens = state[1]
        self._take(backend)

    def _take(self, backend: Any) -> None:
        self.backend = backend
        # As with SentencePiece's, see there: sums of scores, in whose ties and rounding all before a place has a part.
        self.is_local = type(backend.model).__name__ != "Unigram"


class SlowHuggingFaceEncoder(BatchEncoder):
    """Encodes with a transformers tokenizer written in Python."""

    is_local = True

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """See BatchEncoder."""
        return join_ids(self.tokenizer.encode(text, add_special_tokens=False) for text in texts)

    def token_id(self, token: str) -> int | None:
        """See BatchEncoder."""
        found: int | None = self.tokenizer.get_vocab().get(token)
        return found

    def definition(self) -> bytes:
        """See BatchEncoder: vocabulary, settings and files; not in it is what its Python code does with them."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        settings = [
            (name, _content_of(value))
            for name, value in sorted(self.tokenizer.init_kwargs.items())
            if name != "name_or_path"  # where it lies decides over no id
        ]
        return repr((type(self.tokenizer).__qualname__, vocabulary, settings)).encode()


class SentencePieceEncoder(BatchEncoder):
    """Encodes with a SentencePiece model given as bytes; the processor is made again after unpickling."""

    max_whole_bytes = 1 << 23

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.processor = _sentencepiece_processor(model)
        # A unigram model adds up the scores of all the text before a place, in 32 bits: where two ways to split a
        # word are close, the rounding decides, and with it everything before.
        self.is_local = not is_unigram(model)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """See BatchEncoder."""
        return join_ids(self.processor.encode_as_ids(text) for text in texts)

    def token_id(self, token: str) -> int | None:
        """See BatchEncoder."""
        found = int(self.processor.piece_to_id(token))  # the unknown piece for what is none
        return found if self.processor.id_to_piece(found) == token else None

    def __reduce__(self) -> tuple[type[SentencePieceEncoder], tuple[bytes]]:
        """Send the model's bytes only."""
        return SentencePieceEncoder, (self.model,)


class NullEncoder(BatchEncoder):
    """Reads ids written as decimal numbers between single spaces."""

    is_local = True
    separator = " "

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """See BatchEncoder."""
        batch = [[int(number) for number in text.split(" ")] for text in texts]
        if any(not 0 <= token_id < self.vocab_size for ids in batch for token_id in ids):
            raise ValueError(f"a token id is outside 0..{self.vocab_size - 1}")
        return join_ids(batch)


def join_ids(batch: Iterable[list[int]]) -> EncodedTexts:
    """Return lists of ids as one array. Raises OverflowError for an id that 32 bits do not hold."""
    # array reads a list three times faster than numpy does, and refuses what does not fit. One for all texts: there
    # may be millions of them, and the smallest array of its own takes a hundred bytes.
    ids, lengths = array("I"), array("q")
    for text_ids in batch:
        ids.fromlist(text_ids)
        lengths.append(len(text_ids))
    return EncodedTexts(np.asarray(ids), np.asarray(lengths))


def join_encoded(pieces: Sequence[EncodedTexts]) -> EncodedTexts:
    """Return the results of several calls as one."""
    if not pieces:
        return EncodedTexts(np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64))
    return EncodedTexts(
        np.concatenate([piece.ids for piece in pieces]), np.concatenate([piece.lengths for piece in pieces])
    )


def _content_of(setting: object) -> str:
    """Return the digest of the file that a setting names, wherever that lies; of another setting what it is."""
    if isinstance(setting, str) and Path(setting).is_file():
        return hashlib.sha256(read_bytes(setting)).hexdigest()
    return repr(setting)


def _sentencepiece_processor(model: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)
