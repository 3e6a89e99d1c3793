"""Bring teacher states to the student's width without parameters: 1-D linear interpolation of the hidden axis.

Source: arXiv 2602.05393. The sampling points are those of `torch.nn.functional.interpolate(mode="linear",
align_corners=False)`: output i reads position (i + 0.5) * d_t / width - 0.5, clamped to [0, d_t - 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def at_least_fp32(values: Tensor) -> Tensor:
    """Return `values` in fp32; fp64, which only tests use, stays as it is."""
    return values if values.dtype == torch.float64 else values.float()


def interpolate_width(states: Tensor, width: int) -> Tensor:
    """Return `states` resampled along the last axis, in fp32 (fp64 for fp64).

    Two ways to the same values, up to fp32 rounding of torch's positions: torch's linear kernel on CPU, where it is
    five to ten times faster than gathers; gathers elsewhere, since that kernel on CUDA is parallel over the output
    width alone and loops over the tokens.

    Args:
        states: [..., d_t]; differentiable.
        width: d, the last axis of the result [..., d]. With d == d_t the values are returned as they are.
    """
    values = at_least_fp32(states)
    if states.shape[-1] == width:
        return values
    if states.device.type == "cpu":
        flat = values.reshape(1, -1, states.shape[-1])  # [1, tokens, d_t]
        return interpolate(flat, size=width, mode="linear").view(*states.shape[:-1], width)
    return gather_interpolate(values, width)


def gather_interpolate(values: Tensor, width: int) -> Tensor:
    """Return `values` [..., d_t] resampled to [..., width] by two gathers and a lerp, in their own dtype."""
    left, right, share = sampling_points(values.shape[-1], width, device=values.device)
    return values.index_select(-1, left).lerp_(values.index_select(-1, right), share.to(values.dtype))


def interpolation_matrix(input_width: int, output_width: int) -> Tensor:
    """Return the map of `interpolate_width` as a dense matrix [output_width, input_width] in fp64."""
    left, right, share = sampling_points(input_width, output_width, device=torch.device("cpu"))
    rows = torch.arange(output_width)
    matrix = torch.zeros(output_width, input_width, dtype=torch.float64)
    matrix.index_put_((rows, left), 1 - share, accumulate=True)
    matrix.index_put_((rows, right), share, accumulate=True)
    return matrix


def sampling_points(
    input_width: int, output_width: int, *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left neighbour, right neighbour (int64) and share of the right one (fp64), each [output_width].

    The position is kept as a fraction of integers, so that no rounding moves a point over a neighbour.
    """
    outputs = torch.arange(output_width, device=device)
    numerator = ((2 * outputs + 1) * input_width - output_width).clamp_min(0)
    denominator = 2 * output_width
    left = torch.div(numerator, denominator, rounding_mode="floor")
    share = (numerator - left * denominator).double() / denominator
    return left, (left + 1).clamp_max(input_width - 1), share
