"""LET inside a training step: an identity on layer k's output whose backward adds the alignment gradient.

No loss leaves the layer. The forward pass is unchanged, pipeline messages too; loss and gradient are computed once,
in backward, so a first pass of activation recompute costs nothing and nothing is counted twice. In any loop:

    target = AlignmentTarget(states, mask, objective.gradient_scale(iteration, ...), record=seen.append)
    hidden = add_alignment_gradient(hidden, target)  # at the output of layer k, e.g. in a forward hook
    language_model_loss.backward()                   # now carries the gradient of w * L_proj as well
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_let.let.losses import AlignmentLoss, AlignmentSums, cosine_alignment
from megatron_let.let.projection import at_least_fp32
from megatron_let.let.schedule import LetSchedule


@dataclass(frozen=True)
class AlignmentTarget:
    """What layer k is aligned to in one microbatch: this rank's tokens only."""

    states: Tensor
    """[s, b, d_t] teacher states at the teacher's width and dtype."""

    mask: Tensor
    """[s, b] weight of each token: the loss mask, sliced as `states` is."""

    gradient_scale: float | Tensor
    """Factor of d(loss_sum)/d(hidden), loss scale included; a 0-dim tensor costs no host synchronisation."""

    record: Callable[[AlignmentSums], None]
    """Called once per backward with the detached, unscaled sums; on CUDA from autograd's own thread."""

    loss: AlignmentLoss = cosine_alignment
    """The alignment loss."""

    inspect: Callable[[Tensor], None] | None = None
    """Called once per backward, after `record`, with d(loss_sum)/d(hidden) [s, b, d] in fp32, unscaled."""


@dataclass(frozen=True)
class AlignmentObjective:
    """LET's settings for a run: when the teacher counts, how much, and by which loss."""

    schedule: LetSchedule
    student_layer: int
    """k, 1-based: the layer whose output is aligned."""

    loss: AlignmentLoss = cosine_alignment

    def gradient_scale(
        self,
        completed_iterations: int,
        *,
        loss_scale: float | Tensor,
        num_tokens: float | Tensor,
        num_microbatches: int,
        calculate_per_token_loss: bool = False,
    ) -> float | Tensor:
        """Return the factor of d(loss_sum)/d(hidden): loss_scale * w, divided unless the caller divides later.

        Args:
            completed_iterations: s, attempted iterations so far.
            loss_scale: scale of the language-model loss (fp16), 1 otherwise.
            num_tokens: n, counted tokens of this rank's microbatch: its context-parallel share, never its
                sequence-parallel slice.
            num_microbatches: of the iteration on this data-parallel rank.
            calculate_per_token_loss: gradients are sums that are divided once at the end of the iteration.
        """
        scale = loss_scale * self.schedule.weight_at(completed_iterations)
        if calculate_per_token_loss:
            return scale
        at_least_one = num_tokens.clamp_min(1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
        return scale / (at_least_one * num_microbatches)


def add_alignment_gradient(hidden: Tensor, target: AlignmentTarget) -> Tensor:
    """Return `hidden` unchanged; its backward adds `target.gradient_scale` * d(loss_sum)/d(hidden).

    Args:
        hidden: [s, b, d] in bf16, fp16 or fp32. Not requiring gradient, it comes back as it is and nothing will be
            recorded. It is kept for backward and must not be changed in place.
        target: the teacher's side of the same tokens.

    The result shares memory with `hidden` but is no view of it to autograd, as Megatron's pipeline schedules require
    (they drop an output's data and assert that it has no base).
    """
    assert hidden.shape[:-1] == target.states.shape[:-1] == target.mask.shape, (
        f"hidden {tuple(hidden.shape)}, teacher states {tuple(target.states.shape)} and mask "
        f"{tuple(target.mask.shape)} must describe the same tokens"
    )
    if not (hidden.requires_grad and torch.is_grad_enabled()):
        return hidden
    return _AddAlignmentGradient.apply(hidden, target)


class _AddAlignmentGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, target: AlignmentTarget) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.target = target
        # an input returned as it is would become a view with a base; a detached alias does not
        return hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        sums, gradient = loss_and_gradient(hidden, ctx.target)
        ctx.target.record(sums)
        if ctx.target.inspect is not None:
            ctx.target.inspect(gradient)
        # scaled and added in fp32, rounded once: under fp16 the loss scale must come before the cast
        total = output_gradient + gradient * ctx.target.gradient_scale
        return total.to(hidden.dtype), None


def loss_and_gradient(hidden: Tensor, target: AlignmentTarget) -> tuple[AlignmentSums, Tensor]:
    """Return the detached sums and d(loss_sum)/d(hidden) [s, b, d] in fp32, unscaled."""
    with torch.enable_grad():
        leaf = at_least_fp32(hidden.detach()).requires_grad_()
        sums = target.loss(leaf, target.states, target.mask)
        (gradient,) = torch.autograd.grad(sums.loss_sum, leaf)
    return sums.detach(), gradient
