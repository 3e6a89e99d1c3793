"""Width interpolation against matrices worked out by hand and against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from megatron_let.let import interpolate_width
from megatron_let.let.projection import gather_interpolate, interpolation_matrix

Interpolation = Callable[[Tensor, int], Tensor]

UP_2_TO_4 = [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
DOWN_4_TO_2 = [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
UP_2_TO_3 = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
# positions 1/3 * (i + 0.5) - 0.5 clamped at 0 for one input: every output is that input
UP_1_TO_3 = [[1.0], [1.0], [1.0]]


@pytest.mark.parametrize("by_hand", [UP_2_TO_4, DOWN_4_TO_2, UP_2_TO_3, UP_1_TO_3])
@pytest.mark.parametrize("function", [interpolate_width, gather_interpolate])
def test_both_ways_equal_the_matrix_by_hand(by_hand: list[list[float]], function: Interpolation) -> None:
    matrix = torch.tensor(by_hand)
    width, input_width = matrix.shape
    assert torch.equal(interpolation_matrix(input_width, width), matrix.double())
    states = torch.randn(3, 5, input_width)
    # 1e-6: a few roundings of fp32 values of size 1
    torch.testing.assert_close(function(states, width), states @ matrix.t(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("input_width", "width"), [(48, 64), (64, 48), (96, 256), (576, 2048), (768, 100), (7, 3)]
)
@pytest.mark.parametrize("function", [interpolate_width, gather_interpolate])
def test_both_ways_equal_torch_and_the_matrix_form(
    input_width: int, width: int, function: Interpolation
) -> None:
    states = torch.randn(2, 3, input_width)
    ours = function(states, width)
    assert ours.shape == (2, 3, width)
    # torch keeps positions, up to input_width, in fp32: a share is off by an ulp of that, times neighbours up to 8 apart
    tolerance = 8 * input_width * 2**-23
    torch.testing.assert_close(ours, interpolate(states, size=width, mode="linear"), rtol=0, atol=tolerance)
    by_matrix = (states.double() @ interpolation_matrix(input_width, width).t()).float()
    # our own positions are exact: a few roundings of values of size 1 remain
    exact = tolerance if function is interpolate_width else 1e-6
    torch.testing.assert_close(ours, by_matrix, rtol=0, atol=exact)


def test_rows_of_the_matrix_sum_to_one() -> None:
    sums = interpolation_matrix(48, 64).sum(1)
    torch.testing.assert_close(sums, torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-15)


def test_equal_width_is_the_identity_without_a_copy() -> None:
    states = torch.randn(2, 3, 16)
    assert interpolate_width(states, 16).data_ptr() == states.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_interpolated_in_fp32(dtype: torch.dtype) -> None:
    states = torch.randn(2, 3, 48).to(dtype)
    ours = interpolate_width(states, 64)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, interpolate_width(states.float(), 64))
    assert interpolate_width(states, 48).dtype == torch.float32


@pytest.mark.parametrize("function", [interpolate_width, gather_interpolate])
def test_gradient_is_the_transposed_matrix(function: Interpolation) -> None:
    states = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 64, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((function(states, 64) * weights).sum(), states)
    # 1e-12: sums of a few fp64 products
    torch.testing.assert_close(gradient, weights @ interpolation_matrix(48, 64), rtol=0, atol=1e-12)
