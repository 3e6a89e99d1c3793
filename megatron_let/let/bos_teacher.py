"""A teacher that reads a beginning-of-sequence token before everything, as its tokenizer gave it in its own training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_let.errors import ConfigError
from megatron_let.let.own_loss import LmHead
from megatron_let.let.teacher import Teacher


class BosTeacher(Teacher):
    """Another teacher, with `bos` in front of each sequence and its state left out: one state a token, as ever.

    Every segment that `segment_states` cuts begins with it: a document where documents are kept apart, else a row, and
    what follows where the context is used up. Positions count from the bos on, so the teacher's context holds one
    token less.
    """

    def __init__(self, inner: Teacher, bos: int) -> None:
        """Wrap `inner`. Raises ConfigError when it has no such id, or no room for one more token."""
        if bos >= inner.vocab_size:
            raise ConfigError(
                f"teacher {inner.description} knows ids up to {inner.vocab_size - 1} and its tokenizer's bos is {bos}: give "
                "the tokenizer of the model, or --let-teacher-bos off"
            )
        if inner.context_length is not None and inner.context_length < 2:
            raise ConfigError(
                f"teacher {inner.description} reads one token: there is no room for a bos before it"
            )
        self._inner = inner
        self._bos = bos

    @property
    def hidden_size(self) -> int:
        return self._inner.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._inner.vocab_size

    @property
    def context_length(self) -> int | None:
        """Return the inner length less the bos."""
        length = self._inner.context_length
        return None if length is None else length - 1

    @property
    def description(self) -> str:
        return f"{self._inner.description}, bos {self._bos} first"

    def states(self, tokens: Tensor) -> Tensor:
        """Return the states [n, l, d_t] of `tokens` [n, l], each of which has seen the bos; see `Teacher.states`."""
        bos = tokens.new_full((tokens.shape[0], 1), self._bos)
        states = self._inner.states(torch.cat([bos, tokens], dim=1))  # [n, 1 + l, d_t]
        # contiguous: a view would keep the bos's states alive until backward
        return states[:, 1:].contiguous()

    def take_lm_head(self) -> LmHead | None:
        return self._inner.take_lm_head()

    def to(self, device: torch.device | str) -> BosTeacher:
        self._inner.to(device)
        return self

    def parameters(self) -> Iterator[Tensor]:
        return self._inner.parameters()


def with_bos(teacher: Teacher, bos: int | None) -> Teacher:
    """Return the teacher reading `bos` before everything; itself where that is None."""
    return teacher if bos is None else BosTeacher(teacher, bos)
