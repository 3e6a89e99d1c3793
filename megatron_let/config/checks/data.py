"""Rules on data sources and tokenizers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megatron_let.config.checks.rules import given, require, require_takes_effect
from megatron_let.config.run_config import RunConfig
from megatron_let.plain_json import shown

TOKENIZER_FILES = {
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "NullTokenizer": (),
}
"""Tokenizer type -> settings it needs; it takes no other of these."""

_PER_SPLIT = ("train_data_path", "valid_data_path", "test_data_path")


def check_source(config: RunConfig) -> None:
    """There is one source of data."""
    data = config.data
    sources = given(data, "data_path", "mock_data") + (
        ["--train-data-path ..."] if given(data, *_PER_SPLIT) else []
    )
    require(
        len(sources) == 1,
        "give one source of data (--data-path, or --train-data-path with --valid-data-path and --test-data-path, or "
        f"--mock-data), got {' and '.join(sources) if sources else 'none'}",
    )
    if given(data, *_PER_SPLIT):
        require(
            data.train_data_path is not None or config.validation.skip_train,
            f"{' and '.join(given(data, *_PER_SPLIT))} without --train-data-path; give it too",
        )
        require(data.split is None, "--split cannot take effect with one path for each split; leave it out")
    else:
        check_split(data.split)
    for name in ("data_path", *_PER_SPLIT):
        check_blend(f"--{name.replace('_', '-')}", getattr(data, name) or ())


def check_split(split: str | None) -> None:
    """A split is one to three shares, the first (training) above zero."""
    if split is None:
        return
    words = re.split(r"[\s,/]+", split.strip(" '\""))
    are_numbers = all(re.fullmatch(r"\d+\.?\d*|\.\d+", word) for word in words)
    require(
        are_numbers and 1 <= len(words) <= 3 and float(words[0]) > 0,
        f"--split is up to three shares for training, validation and test such as 969,30,1, got {shown(split)}",
    )


def check_blend(flag: str, words: Sequence[str]) -> None:
    """A blend is prefixes alone, or weight and prefix by turns."""
    if not any(_is_number(word) for word in words):
        return
    weights, prefixes = words[::2], words[1::2]
    by_turns = len(words) % 2 == 0 and all(_is_number(word) for word in weights)
    require(
        by_turns and not any(_is_number(word) for word in prefixes),
        f"{flag} is one or more prefixes, or WEIGHT PREFIX WEIGHT PREFIX ..., got {shown(' '.join(words), 300)}",
    )
    require(
        all(0 < float(weight) < math.inf for weight in weights),
        f"{flag} needs weights above 0, got {shown(' '.join(weights), 300)}; leave out a data set that is not wanted",
    )


def _is_number(word: str) -> bool:
    """Return whether `word` would be read as a weight."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def check_tokenizer(config: RunConfig) -> None:
    """A tokenizer has the files it needs and no others."""
    tokenizer = config.tokenizer
    kind = tokenizer.tokenizer_type
    if kind is None:
        return
    needed = TOKENIZER_FILES[kind]
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(tokenizer, name) is None]
    require(not missing, f"--tokenizer-type {kind} needs {' and '.join(missing)}")
    others = [name for name in ("tokenizer_model", "vocab_file", "merge_file") if name not in needed]
    require_takes_effect(tokenizer, *others, needs=f"a --tokenizer-type other than {kind}")
    if kind == "NullTokenizer":
        require(config.model.vocab_size is not None, "--tokenizer-type NullTokenizer needs --vocab-size")
