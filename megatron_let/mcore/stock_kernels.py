"""The same sums in fewer passes where megatron-core falls back to plain PyTorch: without Transformer Engine and apex.

Equal to megatron-core's own fallbacks up to the order of rounding; what each saves is in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_let.mcore.recompute import mended_recompute

_CORE_CROSS_ENTROPY = tensor_parallel.vocab_parallel_cross_entropy
_CORE_ROTATION = rope_utils._apply_rotary_pos_emb_bshd


@contextmanager
def stock_kernels(*, is_on_gpu: bool | None = None) -> Iterator[None]:
    """Put this module's functions in the place of megatron-core's fallbacks inside the context.

    Kernels of Transformer Engine or apex, where megatron-core found them, stay in use. `is_on_gpu`: for which device;
    by default that of this machine.
    """
    replacements: list[tuple[Any, str, Any]] = [
        (rope_utils, "_apply_rotary_pos_emb_bshd", rotate_positions),
        *mended_recompute(),
    ]
    if not (torch.cuda.is_available() if is_on_gpu is None else is_on_gpu):
        replacements += [
            (layers, "_grad_accum_fusion_available", True),
            (layers, "fused_weight_gradient_mlp_cuda", WeightGradients),
            (tensor_parallel, "vocab_parallel_cross_entropy", cross_entropy),
        ]
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        replacements.append((clip_grads, "l2_norm_impl", multi_tensor_l2_norm))
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        replacements.append((clip_grads, "multi_tensor_scale_impl", multi_tensor_scale))
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield


def rotate_positions(
    states: Tensor,
    angles: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """Return `states` [s, b, n, d] turned by the rotary `angles` [s, 1, 1, r], r <= d; dimensions from r on stay.

    LLaMA's form turns dimension i with i + r/2: x * cos + roll(x, r/2) * (-sin, +sin), two passes in place of the
    five of negate, concatenate, multiply, add, concatenate. Other forms go to megatron-core's function.
    """
    if rotary_interleaved or multi_latent_attention:
        return _CORE_ROTATION(states, angles, rotary_interleaved, multi_latent_attention, mscale)
    rotated_width = angles.shape[-1]
    half = rotated_width // 2
    cos = (angles.cos() * mscale).to(states.dtype)
    sin = (angles.sin() * mscale).to(states.dtype)
    signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)  # [s, 1, 1, r]
    turning = states if rotated_width == states.shape[-1] else states[..., :rotated_width]
    turned = torch.addcmul(turning * cos, turning.roll(half, -1), signed_sin)  # [s, b, n, r]
    return turned if turning is states else torch.cat((turned, states[..., rotated_width:]), dim=-1)


class WeightGradients:
    """What `--gradient-accumulation-fusion` calls, on CPU: add a linear layer's weight gradient where it is kept."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, output_gradient: Tensor, main_gradient: Tensor) -> None:
        """Add output_gradient^T [o, n] x inputs [n, i] to `main_gradient` [o, i], in one matrix product if all is fp32."""
        if inputs.dtype == main_gradient.dtype:
            main_gradient.addmm_(output_gradient.t(), inputs)
        else:
            main_gradient.add_(output_gradient.t().matmul(inputs))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss [s, b] of `logits` [s, b, v / tp]; where the vocabulary is whole, torch's fused two passes."""
    if parallel_state.get_tensor_model_parallel_world_size() > 1 or label_smoothing > 0.0:
        return _CORE_CROSS_ENTROPY(logits, labels, label_smoothing)
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels)


def multi_tensor_l2_norm(
    _chunk_size: int, _overflow: Tensor, tensor_lists: Sequence[Sequence[Tensor]], _per_tensor: bool
) -> tuple[Tensor, None]:
    """Return the L2 norm [1] of all tensors together, on their device and without waiting for it."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).float().view(1), None


def multi_tensor_scale(
    _chunk_size: int, _overflow: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float | Tensor
) -> None:
    """Write `scale` times the first list's tensors into the second's; most often the two are the same."""
    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `states` [..., h] / rms(states) * `weight` [h], computed in fp32.

    On CPU torch runs its own rms_norm as a dozen elementwise operations; this is half of them, forward and backward.
    """
    return _RmsNorm.apply(states, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)  # [..., 1]
        inverse = norm.square_().div_(states.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return (states * inverse).mul_(weight).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight, inverse = ctx.saved_tensors
        unit = states * inverse  # [..., h], fp32
        product = gradient * unit
        weight_gradient = product.flatten(0, -2).sum(0)  # [h]
        # what normalising takes away: the part of the gradient along the state
        along = torch.mv(product.flatten(0, -2), weight.float()).div_(states.shape[-1])  # [n]
        states_gradient = (
            (gradient.float() * weight).addcmul_(unit, along.view_as(inverse), value=-1).mul_(inverse)
        )
        return states_gradient.to(states.dtype), weight_gradient.to(weight.dtype), None
