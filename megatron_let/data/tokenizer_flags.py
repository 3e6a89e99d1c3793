"""The flags that say which tokenizer, as the data programs take them: each type has its own, others are refused."""

from __future__ import annotations

import argparse

from megatron_let.errors import ConfigError

_PLACES = ("--tokenizer-model", "--vocab-file", "--merge-file", "--vocab-size")


def add_tokenizer_places(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say where the tokenizer is."""
    group.add_argument("--tokenizer-model", help="Hugging Face directory, or SentencePiece .model file")
    group.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    group.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    group.add_argument("--vocab-size", type=int, help="ids before eod of NullTokenizer")


def given_places(arguments: argparse.Namespace) -> list[str]:
    """Return those of the flags that the user gave."""
    return [flag for flag in _PLACES if _value(arguments, flag) is not None]


def places_of(tokenizer_type: str) -> tuple[str, ...]:
    """Return the flags that say where a tokenizer of this type is."""
    if tokenizer_type == "GPT2BPETokenizer":
        return ("--vocab-file", "--merge-file")
    return ("--vocab-size",) if tokenizer_type == "NullTokenizer" else ("--tokenizer-model",)


def refuse_without_effect(arguments: argparse.Namespace, tokenizer_type: str) -> None:
    """Refuse flags that a tokenizer of this type does not take.

    `--encode-special-tokens` is accepted for SentencePiece models, where it is always so.

    Raises:
        ConfigError: there is one.
    """
    own = places_of(tokenizer_type)
    others = [flag for flag in given_places(arguments) if flag not in own]
    if tokenizer_type == "NullTokenizer" and _value(arguments, "--encode-special-tokens"):
        others.append("--encode-special-tokens")
    if others:
        verb = "have" if len(others) > 1 else "has"
        raise ConfigError(
            f"{' and '.join(others)} {verb} no effect with {tokenizer_type}, which is given by {' and '.join(own)}: "
            "leave it out, or give another --tokenizer-type"
        )


def _value(arguments: argparse.Namespace, flag: str) -> object:
    return getattr(arguments, flag[2:].replace("-", "_"), None)
