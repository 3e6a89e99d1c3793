"""Tokenizers under Megatron-LM's names, with the few properties that training and preprocessing need.

Libraries are imported when a tokenizer is built, so that importing this module costs nothing. Ids are those that
Megatron-LM core_v0.16.1 writes by default: no bos in front, special tokens written out in a text are recognised.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_let.data import hf_directory
from megatron_let.data.batch_encoders import (
    BackendEncoder,
    BatchEncoder,
    NullEncoder,
    SentencePieceEncoder,
)
from megatron_let.data.directory_encoder import directory_encoder
from megatron_let.data.fingerprint import document_special_ids
from megatron_let.data.tokenizer_facts import TokenizerFacts, facts_of_hf_tokenizer
from megatron_let.errors import ConfigError, MissingFilesError
from megatron_let.regular_files import read_bytes

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TOKENIZER_TYPES = ("HuggingFaceTokenizer", "GPT2BPETokenizer", *SENTENCEPIECE_TYPES, "NullTokenizer")

# megatron.core's own mark for "no pad token in the data": no label equals it, so no loss is masked.
NO_PAD = -1
NO_EOD = -1
"""The eod of a tokenizer that has none; no id equals it."""
GPT2_END_OF_TEXT = "<|endoftext|>"
# Gaps between ids are rows of the embedding that nothing trains: some are usual, billions are a mistake.
_IDS_PER_TOKEN, _FREE_IDS = 16, 1 << 16


class Tokenizer(ABC):
    """What training and preprocessing may ask of a tokenizer."""

    tokenizer_type: str
    """Megatron-LM's name of the kind."""
    name: str
    """Where it came from: absolute path, cache name or size."""
    vocab_size: int
    """Largest id + 1: the smallest embedding that no id overruns."""
    eod: int
    """Id that ends a document."""
    pad: int
    """Id whose labels carry no loss, or -1."""
    facts: TokenizerFacts | None
    """What it is compared by; None for NullTokenizer, which has no vocabulary."""

    @property
    def fingerprint(self) -> str | None:
        """Return the vocabulary's value, see `fingerprint.py`."""
        return None if self.facts is None else self.facts.fingerprint

    @property
    def encoding_fingerprint(self) -> str | None:
        """Return the encoding's value, see `encoding_fingerprint.py`."""
        return None if self.facts is None else self.facts.encoding_fingerprint

    @abstractmethod
    def batch_encoder(self) -> BatchEncoder:
        """Return the picklable part that encodes."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens written out."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`, without bos or eod."""
        return self.batch_encoder().encode([text]).to_lists()[0]

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """Return what megatron.core hashes into the name of a dataset's index cache (JSON-serialisable).

        The vocabulary counts, not its path: a moved tokenizer keeps its cache, a changed one loses it.
        """
        return OrderedDict(
            [
                ("class", type(self).__name__),
                ("tokenizer_type", self.tokenizer_type),
                ("fingerprint", self.fingerprint),
                ("vocab_size", self.vocab_size),
                ("eod", self.eod),
            ]
        )


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer directory of Hugging Face's form. eod is its eos."""

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(
        self,
        name_or_path: str,
        *,
        encode_special_tokens: bool = False,
        without_torch: bool = False,
        needs_eod: bool = True,
    ) -> None:
        self._tokenizer = hf_directory.load_auto_tokenizer(name_or_path, without_torch=without_torch)
        self._encoder = directory_encoder(self._tokenizer, name_or_path)
        if encode_special_tokens:
            _take_special_tokens_as_text(self._encoder, name_or_path)
        self.name = _absolute(name_or_path)
        self.vocab_size = _largest_id(hf_directory.token_to_id_of(self._tokenizer), self.name) + 1
        self.eod = _eod_of(hf_directory.end_of_document_id_of(self._tokenizer), self.name, needs_eod)
        self.pad = _pad_or_none(self._tokenizer.pad_token_id, self.eod)
        self.facts = facts_of_hf_tokenizer(self._tokenizer, self._encoder)

    def batch_encoder(self) -> BatchEncoder:
        """See Tokenizer."""
        return self._encoder

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class GPT2BPETokenizer(Tokenizer):
    """GPT-2's byte-level BPE from vocab.json and merges.txt. eod is <|endoftext|>."""

    tokenizer_type = "GPT2BPETokenizer"

    def __init__(self, vocab_file: str, merge_file: str, *, encode_special_tokens: bool = False) -> None:
        self._backend = _gpt2_backend(vocab_file, merge_file)
        self._backend.encode_special_tokens = encode_special_tokens
        self.name = _absolute(vocab_file)
        token_to_id: Mapping[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = _largest_id(token_to_id, self.name) + 1
        self.eod = self._backend.token_to_id(GPT2_END_OF_TEXT)
        self.pad = NO_PAD
        special_ids = document_special_ids(eos=self.eod, bos=self.eod)
        self.facts = TokenizerFacts(token_to_id, special_ids, BackendEncoder(self._backend))

    def batch_encoder(self) -> BatchEncoder:
        """See Tokenizer."""
        return BackendEncoder(self._backend)

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file; Megatron's three names for it give the same ids. eod is its eos."""

    def __init__(self, model_file: str, tokenizer_type: str, *, needs_eod: bool = True) -> None:
        self.tokenizer_type = tokenizer_type
        self.name = _absolute(model_file)
        self._encoder = _load_sentencepiece(model_file)
        processor = self._encoder.processor
        self.vocab_size = processor.get_piece_size()
        self.eod = _eod_of(_known(processor.eos_id()), self.name, needs_eod)
        self.pad = _pad_or_none(_known(processor.pad_id()), self.eod)
        token_to_id = {processor.id_to_piece(index): index for index in range(self.vocab_size)}
        special_ids = document_special_ids(eos=_known(self.eod), bos=_known(processor.bos_id()))
        self.facts = TokenizerFacts(token_to_id, special_ids, self._encoder)

    def batch_encoder(self) -> BatchEncoder:
        """See Tokenizer."""
        return self._encoder

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return str(self._encoder.processor.decode_ids([int(token_id) for token_id in ids]))


class NullTokenizer(Tokenizer):
    """No vocabulary: texts are numbers. `vocab_size` N means N + 1 ids, the last of which ends documents."""

    tokenizer_type = "NullTokenizer"

    def __init__(self, vocab_size: int) -> None:
        self.name = str(vocab_size)
        self.vocab_size = vocab_size + 1
        self.eod = vocab_size
        self.pad = NO_PAD
        self.facts = None

    def batch_encoder(self) -> BatchEncoder:
        """See Tokenizer."""
        return NullEncoder(self.vocab_size)

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return " ".join(str(token_id) for token_id in ids)


def build_tokenizer(
    *,
    tokenizer_type: str | None,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
    encode_special_tokens: bool = False,
    without_torch: bool = False,
    needs_eod: bool = True,
) -> Tokenizer:
    """Build the tokenizer that Megatron-LM's flags of the same names describe.

    encode_special_tokens: encode a special token that is written out in a text as the ordinary text it is, instead
    of taking it for the real one, as Megatron-LM does. SentencePiece models never take it for one.
    without_torch: see `hf_directory.load_auto_tokenizer`; never for training.
    needs_eod: refuse a tokenizer without eos, whose eod is otherwise NO_EOD; never False for training.

    Raises:
        ConfigError: unknown type, a flag that the type needs is absent, a missing or broken file, no eos, special
        tokens that cannot be had as text.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(
            _given(tokenizer_model, "--tokenizer-model", tokenizer_type),
            encode_special_tokens=encode_special_tokens,
            without_torch=without_torch,
            needs_eod=needs_eod,
        )
    if tokenizer_type == "GPT2BPETokenizer":
        return GPT2BPETokenizer(
            _given(vocab_file, "--vocab-file", tokenizer_type),
            _given(merge_file, "--merge-file", tokenizer_type),
            encode_special_tokens=encode_special_tokens,
        )
    if tokenizer_type in SENTENCEPIECE_TYPES:
        return SentencePieceTokenizer(
            _given(tokenizer_model, "--tokenizer-model", tokenizer_type),
            tokenizer_type,
            needs_eod=needs_eod,
        )
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None or vocab_size < 1:
            raise ConfigError("NullTokenizer needs --vocab-size of at least 1: the number of ids before eod")
        return NullTokenizer(vocab_size)
    raise ConfigError(f"--tokenizer-type {tokenizer_type} is not one of {', '.join(TOKENIZER_TYPES)}")


def _take_special_tokens_as_text(encoder: BatchEncoder, name: str) -> None:
    if isinstance(encoder, SentencePieceEncoder):
        return  # it never does otherwise
    if not isinstance(encoder, BackendEncoder):
        raise ConfigError(
            f"tokenizer {name} is one without a Rust backend: special tokens written out in a text cannot be encoded "
            "as ordinary text"
        )
    encoder.backend.encode_special_tokens = True


def _gpt2_backend(vocab_file: str, merge_file: str) -> Any:
    for path in (vocab_file, merge_file):
        if not os.path.isfile(path):
            raise MissingFilesError(f"GPT2BPETokenizer: file {path} does not exist")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        backend = Tokenizer(models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:  # tokenizers raises a bare Exception
        raise ConfigError(
            f"GPT2BPETokenizer: cannot read {vocab_file} and {merge_file}: {hf_directory.first_line(error)}"
        ) from error
    if backend.token_to_id(GPT2_END_OF_TEXT) is None:
        raise ConfigError(
            f"GPT2BPETokenizer: {vocab_file} has no {GPT2_END_OF_TEXT}, so documents have no end"
        )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(GPT2_END_OF_TEXT, normalized=False, special=True)])
    return backend


def _load_sentencepiece(model_file: str) -> SentencePieceEncoder:
    if not os.path.isfile(model_file):
        raise MissingFilesError(f"SentencePiece model {model_file} is not a file")
    try:
        return SentencePieceEncoder(read_bytes(model_file))
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"cannot load the SentencePiece model {model_file}: {hf_directory.first_line(error)}"
        ) from error


def _given(value: str | None, flag: str, tokenizer_type: str) -> str:
    if not value:
        raise ConfigError(f"--tokenizer-type {tokenizer_type} needs {flag}")
    return value


def _largest_id(token_to_id: Mapping[str, int], name: str) -> int:
    if not token_to_id:
        raise ConfigError(f"tokenizer {name} has an empty vocabulary")
    largest = max(token_to_id.values())
    if largest > _IDS_PER_TOKEN * len(token_to_id) + _FREE_IDS:
        raise ConfigError(
            f"tokenizer {name} gives id {largest} to a token and has {len(token_to_id)} tokens: an embedding has a row for "
            "each id up to the largest; number the tokens anew"
        )
    return largest


def _eod_of(token_id: int | None, name: str, needs_eod: bool) -> int:
    if token_id is None and not needs_eod:
        return NO_EOD
    if token_id is None:
        raise ConfigError(
            f"tokenizer {name} has no eos token, so documents have no end: set eos_token in its files"
        )
    return token_id


def _pad_or_none(token_id: int | None, eod: int) -> int:
    """Return the pad id, or -1: a pad that is eod would mask the loss of every document end."""
    return NO_PAD if token_id is None or token_id == eod else int(token_id)


def _known(token_id: int) -> int | None:
    """Translate SentencePiece's -1 for "not defined"."""
    return None if token_id < 0 else token_id


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if os.path.exists(path) else path
