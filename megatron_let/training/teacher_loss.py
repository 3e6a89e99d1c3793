"""The teacher's own loss on the first batch: one line in the log, a warning where the teacher is no better than chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_let.let.hf_teacher import RUN_ERRORS
from megatron_let.let.own_loss import LmHead, own_loss
from megatron_let.log import LOGGER


@dataclass(frozen=True)
class TeacherLoss:
    """Sums over a part of the first batch; those of several ranks add up."""

    numbers: torch.Tensor
    """[3] fp64: the loss in nats, that of guessing among the teacher's ids, and the tokens of both."""

    @staticmethod
    def none(device: torch.device) -> TeacherLoss:
        """Return that of no token."""
        return TeacherLoss(torch.zeros(3, dtype=torch.float64, device=device))

    @staticmethod
    def measure(head: LmHead, states: torch.Tensor, tokens: torch.Tensor, num_ids: int) -> TeacherLoss:
        """Return that of `states` [b, s, d_t] at `tokens` [b, s]; of no token where the head needs more than states."""
        try:
            loss, count = own_loss(head, states, tokens)
        except (*RUN_ERRORS, RuntimeError):
            return TeacherLoss.none(states.device)
        return TeacherLoss(torch.stack([loss, count * math.log(num_ids), count]))

    def tell(self) -> None:
        """Log the loss a token beside what guessing gives."""
        loss, chance, count = self.numbers.tolist()
        if not count:
            LOGGER.info("teacher's own loss: not known (a middle layer, or no LM head)")
        elif loss < chance:
            LOGGER.info(
                f"teacher's own loss on the first batch: {loss / count:.3f} (guessing: {chance / count:.3f})"
            )
        else:
            LOGGER.warning(
                f"teacher's own loss on the first batch: {loss / count:.3f}, no better than guessing ({chance / count:.3f}): "
                "broken weights, another tokenizer's data, or text unlike what it was trained on"
            )
