"""The cosine loss, its gradient and its sums, against plain formulas in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from megatron_let.let import AlignmentSums, cosine_alignment
from megatron_let.let.losses import NORM_FLOOR

SEQUENCE, BATCH, WIDTH, TEACHER_WIDTH = 7, 3, 16, 12


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [s, b, d], states [s, b, d_t] and a mask [s, b] with zeros in it; the means are far from 0."""
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, dtype=dtype) + 0.5
    states = torch.randn(SEQUENCE, BATCH, TEACHER_WIDTH, dtype=dtype) - 1.0
    mask = (torch.rand(SEQUENCE, BATCH) < 0.7).float()
    mask[0, 0], mask[0, 1] = 0.0, 1.0
    return hidden, states, mask


def plain_loss_sum(hidden: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    """The definition in torch's own words, for vectors that are not zero."""
    teacher = interpolate(states, size=hidden.shape[-1], mode="linear")
    return -(cosine_similarity(hidden, teacher, dim=-1) * mask).sum()


def test_loss_and_gradient_equal_torchs_cosine_similarity() -> None:
    hidden, states, mask = batch()
    hidden.requires_grad_()
    sums = cosine_alignment(hidden, states, mask)
    expected = plain_loss_sum(hidden, states, mask)
    # 1e-6 on sums of about 10 terms below 1, and on gradients of size 0.1: fp32 rounding
    torch.testing.assert_close(sums.loss_sum.float(), expected, rtol=0, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, hidden)[0] for value in (sums.loss_sum, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert float(sums.count) == float(mask.sum())
    torch.testing.assert_close(sums.loss().float(), (expected / mask.sum()).detach(), rtol=0, atol=1e-6)
    assert float(sums.cosine()) == -float(sums.loss().detach())


def test_gradient_passes_finite_differences_in_fp64() -> None:
    hidden, states, mask = batch(torch.float64)
    hidden.requires_grad_()
    # gradcheck's defaults: differences over 1e-6, tolerance 1e-5 absolute and 1e-3 relative
    assert torch.autograd.gradcheck(lambda h: cosine_alignment(h, states, mask).loss_sum, (hidden,))
    assert torch.autograd.gradcheck(lambda h: cosine_alignment(h, states[..., :1], mask).loss(), (hidden,))


def test_gradient_in_fp32_equals_finite_differences() -> None:
    hidden, states, mask = batch()
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(cosine_alignment(hidden, states, mask).loss_sum, hidden)
    direction = torch.randn_like(hidden)
    step = 1e-5

    def at(offset: float) -> Tensor:
        moved = hidden.detach().double() + offset * direction
        return cosine_alignment(moved, states.double(), mask).loss_sum

    slope = (at(step) - at(-step)) / (2 * step)
    # 1e-5: the fp32 gradient's rounding over 336 terms; the fp64 difference itself is good to 1e-9
    torch.testing.assert_close((gradient * direction).sum().double(), slope, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_vectors_give_cosine_zero_and_finite_gradients(dtype: torch.dtype) -> None:
    hidden, states, _ = (values.to(dtype) for values in batch())
    mask, without_zeros = torch.ones(SEQUENCE, BATCH), torch.ones(SEQUENCE, BATCH)
    hidden[1, 1] = 0.0
    states[2, 2] = 0.0
    hidden[3, 0], states[3, 0] = 0.0, 0.0
    for token in ((1, 1), (2, 2), (3, 0)):
        without_zeros[token] = 0.0
    hidden.requires_grad_()
    sums, others = cosine_alignment(hidden, states, mask), cosine_alignment(hidden, states, without_zeros)
    assert float(sums.dot_sum) == float(others.dot_sum)
    assert float(sums.count) == float(others.count) + 3
    # the slope at a zero vector is 1e6 (next test): scaled as a mean would, it also fits into fp16
    (gradient,) = torch.autograd.grad(sums.loss_sum * 1e-3, hidden)
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient[2, 2], torch.zeros(WIDTH, dtype=dtype))
    assert torch.equal(gradient[3, 0], torch.zeros(WIDTH, dtype=dtype))
    assert torch.isfinite(sums.to_vector()).all()
    assert torch.isfinite(sums.centred_cosine())


@pytest.mark.parametrize("length", [0.0, 0.5 * NORM_FLOOR])
def test_gradient_below_the_floor_is_that_of_the_floored_formula(length: float) -> None:
    direction = torch.randn(1, 1, WIDTH)
    hidden = (direction / direction.norm() * length).requires_grad_()
    states = direction + torch.randn(1, 1, WIDTH)
    (gradient,) = torch.autograd.grad(cosine_alignment(hidden, states, torch.ones(1, 1)).loss_sum, hidden)
    expected = -states / states.norm() / NORM_FLOOR
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)  # fp32 rounding of three operations


def test_a_mask_of_zeros_gives_zero_and_no_nan() -> None:
    hidden, states, _ = batch()
    hidden.requires_grad_()
    sums = cosine_alignment(hidden, states, torch.zeros(SEQUENCE, BATCH))
    (gradient,) = torch.autograd.grad(sums.loss_sum, hidden)
    assert torch.equal(gradient, torch.zeros_like(hidden))
    sums = sums.detach()
    assert [float(value) for value in (sums.loss(), sums.cosine(), sums.centred_cosine(), sums.count)] == [
        0.0
    ] * 4


def test_nan_in_the_states_is_not_hidden() -> None:
    hidden, states, mask = batch()
    states[0, 1, 0] = float("nan")
    sums = cosine_alignment(hidden, states, mask)
    assert all(torch.isnan(value) for value in (sums.loss(), sums.cosine(), sums.centred_cosine()))


def test_states_and_statistics_receive_no_gradient() -> None:
    hidden, states, mask = batch()
    hidden.requires_grad_()
    states.requires_grad_()
    sums = cosine_alignment(hidden, states, mask)
    sums.loss_sum.backward()
    assert states.grad is None
    assert sums.loss_sum.requires_grad
    assert not any(
        value.requires_grad for value in (sums.dot_sum, sums.count, sums.hidden_sum, sums.state_sum)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_whatever_autocast_says(dtype: torch.dtype) -> None:
    hidden, states, mask = (values.to(dtype) for values in batch())
    expected = cosine_alignment(hidden.float(), states.float(), mask.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = cosine_alignment(hidden, states, mask)
    assert torch.equal(ours.to_vector(), expected.to_vector())


def test_vectors_of_any_length_have_the_same_direction() -> None:
    hidden, states, mask = batch()
    long = cosine_alignment(hidden * 1e4, states * 1e-3, mask)
    torch.testing.assert_close(  # 1e-5: fp32 rounding of sums of about 15 terms
        long.to_vector(), cosine_alignment(hidden, states, mask).to_vector(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_add_up_over_any_sharding_of_the_tokens(axis: int) -> None:
    hidden, states, mask = batch()
    whole = cosine_alignment(hidden, states, mask).detach()
    total = AlignmentSums.zeros(WIDTH)
    for piece in range(hidden.shape[axis]):
        index = torch.tensor([piece])
        total = total + cosine_alignment(
            *(values.index_select(axis, index) for values in (hidden, states, mask))
        )
    # 2e-6: per-token values in fp32, sums of about 15 of them; over shards they are added in fp64
    torch.testing.assert_close(total.to_vector(), whole.to_vector(), rtol=0, atol=2e-6)
    torch.testing.assert_close(total.centred_cosine(), whole.centred_cosine(), rtol=0, atol=1e-6)


def test_sums_travel_as_one_vector() -> None:
    sums = cosine_alignment(*batch()).detach()
    vector = sums.to_vector()
    assert vector.shape == (5 + 2 * WIDTH,)
    assert vector.dtype == torch.float64
    back = AlignmentSums.from_vector(vector)
    for name in AlignmentSums.__dataclass_fields__:
        assert torch.equal(getattr(back, name), getattr(sums, name)), name
    assert torch.equal((sums + sums).to_vector(), 2 * vector)


def test_centred_cosine_is_the_correlation_of_the_unit_vectors() -> None:
    hidden, states, mask = batch(torch.float64)
    kept = mask.flatten() > 0
    teacher = interpolate(states, size=WIDTH, mode="linear")
    a, b = (
        values.flatten(0, 1)[kept] / values.flatten(0, 1)[kept].norm(dim=1, keepdim=True)
        for values in (hidden, teacher)
    )
    a, b = a - a.mean(0), b - b.mean(0)
    expected = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    sums = cosine_alignment(hidden, states, mask)
    torch.testing.assert_close(sums.centred_cosine(), expected, rtol=0, atol=1e-12)  # fp64 throughout
    # a shared direction raises the raw cosine and not the centred one: they must differ here
    assert abs(float(sums.centred_cosine()) - float(sums.cosine())) > 0.05


def test_centred_cosine_without_variation_is_zero() -> None:
    hidden, states, _ = batch()
    one_token = torch.zeros(SEQUENCE, BATCH)
    one_token[2, 1] = 1.0
    assert float(cosine_alignment(hidden, states, one_token).centred_cosine()) == 0.0
    same = states[:1, :1].expand(SEQUENCE, BATCH, TEACHER_WIDTH)
    assert float(cosine_alignment(hidden, same, torch.ones(SEQUENCE, BATCH)).centred_cosine()) == 0.0
