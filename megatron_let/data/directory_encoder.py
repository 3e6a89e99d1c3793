"""The encoder of a Hugging Face directory, held against the directory's own files.

transformers builds a tokenizer from its class and takes of the files what the class asks for. Of a SentencePiece model it
makes merges of its own, in another order than the model's scores: other ids for most texts, runs of spaces first. Of a
tokenizer.json it may take vocabulary and merges alone: SmolLM2's, loaded as the GPT2Tokenizer that it calls itself, no longer
splits numerals off. The files are what the model was trained with, so where they say something else they encode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_let.data.batch_encoders import (
    BackendEncoder,
    BatchEncoder,
    SentencePieceEncoder,
    SlowHuggingFaceEncoder,
)
from megatron_let.data.hf_directory import file_in, first_line, is_rebuilt_by_class, token_to_id_of
from megatron_let.data.probes import probe_texts, special_texts
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.regular_files import read_bytes

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SHOWN_CHARACTERS, _SHOWN_IDS = 40, 6
_UNKNOWN = -1


def directory_encoder(tokenizer: Any, name_or_path: str) -> BatchEncoder:
    """Return what encodes as the tokenizer that transformers loaded from `name_or_path` should.

    Raises:
        ConfigError: transformers gives other ids than the SentencePiece model there, and the model alone cannot encode,
            since tokens were added to it or numbered anew.
    """
    found = _encoder_of(tokenizer)
    if file_in(name_or_path, "tokenizer.json") is not None:
        return _by_definition(tokenizer, found, name_or_path)
    path = next(filter(None, (file_in(name_or_path, name) for name in SENTENCEPIECE_FILES)), None)
    model = None if path is None else _sentencepiece(path)
    if model is None:
        return found
    new_ids = _new_ids(model, token_to_id_of(tokenizer))
    texts = _texts_without_special_tokens(model, found)
    right = [new_ids[ids].tolist() for ids in model.encode(texts).to_lists()]
    difference = _first_difference(texts, found.encode(texts).to_lists(), right)
    if not difference:
        return found
    what = f"{name_or_path}: transformers converts {path.name if path else ''} to a tokenizer with other ids ({difference})"
    if (new_ids != np.arange(len(new_ids))).any() or _adds_words(tokenizer, model):
        raise ConfigError(
            f"{what}, and tokens were added to it or numbered anew; give a directory with the tokenizer.json that the "
            "model was trained with"
        )
    LOGGER.warning(
        f"{what}; the file itself encodes, special tokens written out in a text as the text they are"
    )
    return model


def _encoder_of(tokenizer: Any) -> BatchEncoder:
    return (
        BackendEncoder(tokenizer.backend_tokenizer)
        if tokenizer.is_fast
        else SlowHuggingFaceEncoder(tokenizer)
    )


def _by_definition(tokenizer: Any, found: BatchEncoder, name_or_path: str) -> BatchEncoder:
    """Return the encoder that tokenizer.json describes, with the added tokens that transformers knows besides."""
    path = file_in(name_or_path, "tokenizer.json")
    if path is None or not isinstance(found, BackendEncoder) or not is_rebuilt_by_class(tokenizer):
        return found
    from tokenizers import Tokenizer

    content = json.loads(read_bytes(path))
    content["added_tokens"] = json.loads(found.backend.to_str())["added_tokens"]
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception:  # the library raises no other; a class may do without what it does not understand
        return found
    backend.no_truncation()
    backend.no_padding()
    stated = BackendEncoder(backend)
    texts = _texts_without_special_tokens(stated)
    difference = _first_difference(texts, found.encode(texts).to_lists(), stated.encode(texts).to_lists())
    if not difference:
        return found
    LOGGER.warning(
        f"tokenizer {name_or_path}: transformers' {type(tokenizer).__name__} does not do what tokenizer.json says "
        f"({difference}); tokenizer.json's ids are used"
    )
    return stated


def _sentencepiece(path: Path) -> SentencePieceEncoder | None:
    """Return the encoder of a model file, None where the file is of another kind (tiktoken's has the name too)."""
    try:
        return SentencePieceEncoder(read_bytes(path))
    except (RuntimeError, ValueError):
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {first_line(error)}") from error


def _new_ids(model: SentencePieceEncoder, token_to_id: dict[str, int]) -> Any:
    """Return [pieces] int64: the id that transformers gives each piece, -1 where it has none."""
    pieces = map(model.processor.id_to_piece, range(model.processor.get_piece_size()))
    return np.array([token_to_id.get(piece, _UNKNOWN) for piece in pieces], dtype=np.int64)


def _adds_words(tokenizer: Any, model: SentencePieceEncoder) -> bool:
    """Return whether there are added tokens beside special ones: words that a text may hold."""
    num_pieces = model.processor.get_piece_size()
    added = tokenizer.added_tokens_decoder
    return any(token_id >= num_pieces and not token.special for token_id, token in added.items())


def _texts_without_special_tokens(*encoders: BatchEncoder) -> list[str]:
    """Return probes without special tokens: whether those are looked for in a text is another question."""
    special = {text for encoder in encoders for text in special_texts(encoder) if text}
    return [text for text in probe_texts(encoders[0]) if not any(token in text for token in special)]


def _first_difference(texts: list[str], found: list[list[int]], right: list[list[int]]) -> str:
    for text, ids, right_ids in zip(texts, found, right, strict=True):
        if ids != right_ids:
            return f"{text[:_SHOWN_CHARACTERS]!a} gives {ids[:_SHOWN_IDS]}, there {right_ids[:_SHOWN_IDS]}"
    return ""
