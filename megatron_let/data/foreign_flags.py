"""Flags of Megatron-LM's tools/preprocess_data.py that are not acted on: scripts that give them are understood.

Those that change no byte there either, or only choose what is always so here, are accepted. Those that would change
the bytes are refused with what to do; the list with reasons is in docs/decisions/0006.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_let.errors import ConfigError

_TIKTOKEN = (
    "it belongs to TikTokenizer, which is not offered: give a Hugging Face directory of the same tokenizer"
)
_OWN_FILES = "the tokenizer's own files say which special tokens there are: set them there"

REFUSED = (
    ("--split-sentences", 0, "sentences are for BERT: leave it out, a text is one sequence"),
    (
        "--legacy-tokenizer",
        0,
        "the old tokenizers give other ids (some put bos in front of every text): leave it out",
    ),
    (
        "--trust-remote-code",
        0,
        "code that comes with a tokenizer is not run: leave it out; a tokenizer that is nothing but code has to be saved "
        "as tokenizer.json",
    ),
    (
        "--tokenizer-hf-include-special-tokens",
        0,
        "texts are written without bos and eos of their own: leave it out; --append-eod ends documents",
    ),
    (
        "--tokenizer-sentencepiece-legacy",
        0,
        "special tokens beside the model's change the ids: leave it out, the .model file says what they are",
    ),
    ("--tokenizer-metadata", 1, "the type and the tokenizer's own files say what it is: leave it out"),
    ("--tokenizer-special-tokens", "+", _OWN_FILES),
    ("--tiktoken-pattern", 1, _TIKTOKEN),
    ("--tiktoken-num-special-tokens", 1, _TIKTOKEN),
    ("--tiktoken-special-tokens", "+", _TIKTOKEN),
)
"""Flag, how many words follow it, and why it is refused."""


class _Refuse(argparse.Action):
    """Refuses its flag with the reason that stands as its help."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """See argparse. Raises ConfigError."""
        raise ConfigError(f"{option_string}: {self.help}")


def add_foreign_flags(parser: argparse.ArgumentParser) -> None:
    """Add both groups to a parser."""
    ignored = parser.add_argument_group("accepted for Megatron-LM's scripts, without effect here")
    ignored.add_argument("--partitions", type=int, default=1, help="documents keep their order without it")
    ignored.add_argument("--keep-sequential-samples", action="store_true", help="always so")
    ignored.add_argument("--dataset-impl", choices=["mmap"], default="mmap", help="the only form")
    ignored.add_argument("--keep-newlines", action="store_true", help="always so: nothing is split")
    ignored.add_argument("--lang", default="english", help="of sentences, and nothing is split")
    ignored.add_argument("--padded-vocab-size", type=int, help="the model's, no matter of data")
    ignored.add_argument("--vocab-extra-ids", type=int, default=0, help="without effect there too")
    for flag in ("--tokenizer-hf-use-fast", "--tokenizer-hf-no-use-fast"):
        ignored.add_argument(flag, action="store_true", help="the Rust backend is used wherever there is one")
    ignored.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true", help="always so")
    refused = parser.add_argument_group("refused: they would change the bytes")
    for flag, nargs, reason in REFUSED:
        refused.add_argument(flag, nargs=nargs, action=_Refuse, help=reason, metavar="VALUE")
