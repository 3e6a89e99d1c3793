"""A small run that every rule accepts, to be broken one setting at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_let.config.run_config import RunConfig
from megatron_let.training.arguments import parse_arguments

GOOD_RUN = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --micro-batch-size 2 --train-iters 100 "
    "--lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 100"
)

Parse = Callable[..., RunConfig]


@pytest.fixture
def parse() -> Parse:
    """Return a function from words to the settings of the good run with these words added, some left out."""

    def parse_words(words: str = "", *, without: str = "") -> RunConfig:
        base = GOOD_RUN
        for flag in without.split(","):
            assert not flag or flag in base, f"{flag} is not in the good run"
            base = base.replace(flag, "")
        return parse_arguments([*base.split(), *words.split()])

    return parse_words
