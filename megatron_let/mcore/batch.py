"""One microbatch on the device: tokens, labels, masks, positions and document starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_let.config.data import DataConfig
from megatron_let.mcore.parallel import ParallelContext


@dataclass(frozen=True)
class Microbatch:
    """A microbatch as the student sees it; all but `full_tokens` are this context-parallel rank's share.

    tokens, labels, position_ids: [b, s/cp]; loss_mask: [b, s/cp], 1.0 where a token counts in the loss;
    attention_mask: [b, 1, s, s], True where a position must not be seen, or None for causal;
    full_tokens: [b, s], what the teacher reads; document_starts: [b, s] on the CPU, or None where documents see each
    other.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    full_tokens: torch.Tensor
    document_starts: torch.Tensor | None


def build_microbatch(
    tokens: torch.Tensor, labels: torch.Tensor, *, eod: int, data: DataConfig, context: ParallelContext
) -> Microbatch:
    """Derive masks and positions from `tokens` and `labels` [b, s] by Megatron's rules.

    The end-of-document token closes its document: the next token starts a new one. `--eod-mask-loss` takes the
    prediction made AT an end-of-document token out of the loss.
    """
    document_starts = find_document_starts(
        tokens, eod
    )  # where the loader left it: its readers count on the CPU
    tokens = tokens.to(context.device, non_blocking=True)
    labels = labels.to(context.device, non_blocking=True)
    starts = document_starts.to(context.device, non_blocking=True)
    loss_mask = torch.ones_like(tokens, dtype=torch.float32)
    if data.eod_mask_loss:
        loss_mask = (tokens != eod).float()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if data.reset_position_ids:
        positions = positions - _last_start(starts)
    whole = Microbatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=positions,
        attention_mask=_document_mask(starts) if data.reset_attention_mask else None,
        full_tokens=tokens,
        document_starts=document_starts if data.reset_attention_mask else None,
    )
    return _context_parallel_share(whole, context)


def find_document_starts(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Return [b, s], True at position 0 and after every end-of-document token."""
    starts = torch.ones_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == eod
    return starts


def _last_start(starts: torch.Tensor) -> torch.Tensor:
    # [b, s]: the position at which the document of each token starts
    positions = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return torch.where(starts, positions, 0).cummax(dim=1).values


def _document_mask(starts: torch.Tensor) -> torch.Tensor:
    document = starts.long().cumsum(dim=1)  # [b, s]
    is_other = document[:, None, :, None] != document[:, None, None, :]  # [b, 1, s, s]
    length = starts.shape[1]
    is_future = torch.ones(length, length, dtype=torch.bool, device=starts.device).triu(1)
    return is_other | is_future


def _context_parallel_share(batch: Microbatch, context: ParallelContext) -> Microbatch:
    if context.cp_size == 1:
        return batch
    assert batch.attention_mask is None, "validated: document masks do not go with context parallel"
    share = {
        name: context_parallel_slice(getattr(batch, name), dim=1, rank=context.cp_rank, size=context.cp_size)
        for name in ("tokens", "labels", "loss_mask", "position_ids")
    }
    return replace(batch, **share)


def context_parallel_slice(tensor: torch.Tensor, *, dim: int, rank: int, size: int) -> torch.Tensor:
    """Return the two chunks of `tensor` along `dim` that context-parallel rank `rank` of `size` works on.

    The sequence is cut into 2 * size chunks; rank r owns chunks r and 2 * size - 1 - r, which balances causal
    attention (megatron-core's rule).
    """
    if size == 1:
        return tensor
    chunks = tensor.chunk(2 * size, dim=dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=dim)


def sequence_parallel_slice(tensor: torch.Tensor, *, dim: int, rank: int, size: int) -> torch.Tensor:
    """Return the contiguous share of `tensor` along `dim` that tensor-parallel rank `rank` of `size` keeps."""
    return tensor.chunk(size, dim=dim)[rank]
