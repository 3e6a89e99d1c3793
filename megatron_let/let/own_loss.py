"""A teacher's own next-token loss, taken once: what tells a broken teacher from a good one at first sight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LmHead = Callable[[Tensor, Tensor], Tensor]
"""Logits [1, n, v] of states [1, n, d_t] of the last layer at tokens [1, n]."""

# A few thousand tokens tell 3 nats from 11; logits of a few hundred at a time are small beside a training step's.
_MOST_TOKENS, _TOKENS_AT_ONCE = 4096, 256


@torch.no_grad()
def own_loss(head: LmHead, states: Tensor, tokens: Tensor) -> Tensor:
    """Return [sum, count] in fp64 of the cross-entropy (nats) with which each token's state predicts the next token.

    Args:
        head: makes logits of `states`.
        states: [b, s, d_t] of `tokens`.
        tokens: [b, s] ids. Rows are taken from the first on, up to 4,096 tokens.
    """
    total = torch.zeros(2, dtype=torch.float64, device=states.device)
    for row in range(tokens.shape[0]):
        for start in range(0, tokens.shape[1] - 1, _TOKENS_AT_ONCE):
            if total[1] >= _MOST_TOKENS:
                return total
            part = slice(start, min(start + _TOKENS_AT_ONCE, tokens.shape[1] - 1))
            targets = tokens[row, part.start + 1 : part.stop + 1]  # [n]
            with torch.autocast(states.device.type, enabled=False):
                logits = head(states[row : row + 1, part], tokens[row : row + 1, part])[0]  # [n, v]
            loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
            total += torch.stack([loss.double(), torch.full_like(total[1], targets.numel())])
    return total
