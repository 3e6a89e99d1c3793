"""The autograd node: an identity forward, w * dL_proj/dh in backward, once, in every precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_let.let import (
    AlignmentObjective,
    AlignmentSums,
    AlignmentTarget,
    LetSchedule,
    add_alignment_gradient,
    cosine_alignment,
)

SEQUENCE, BATCH, WIDTH, TEACHER_WIDTH, VOCABULARY = 6, 2, 16, 12, 23


def target(scale: float | Tensor, record: Callable[[AlignmentSums], None]) -> AlignmentTarget:
    """Return teacher states and a mask with zeros for [6, 2] tokens, the same on every call."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(SEQUENCE, BATCH, TEACHER_WIDTH, generator=generator)
    mask = torch.ones(SEQUENCE, BATCH)
    mask[1, 0] = mask[4, 1] = 0.0
    return AlignmentTarget(states, mask, scale, record)


def ignore(sums: AlignmentSums) -> None:
    """Record nothing."""


class Block(nn.Module):
    """A pre-norm transformer block on [s, b, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](hidden)).view(SEQUENCE, BATCH, 3, 2, WIDTH // 2)
        query, key, value = heads.permute(2, 1, 3, 0, 4).unbind()  # [b, 2 heads, s, d / 2]
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.permute(2, 0, 1, 3).reshape(SEQUENCE, BATCH, WIDTH))
        return hidden + self.down(torch.tanh(self.up(self.norms[1](hidden))))


class Student(nn.Module):
    """Three blocks with a place to act on the output of the first (k = 1), and chunks that may be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self,
        tokens: Tensor,
        on_layer: Callable[[Tensor], Tensor],
        run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda chunk, hidden: chunk(hidden),
    ) -> Tensor:
        hidden = run(lambda x: self.blocks[1](on_layer(self.blocks[0](x))), self.embedding(tokens))
        logits = self.head(self.blocks[2](hidden))
        return cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 0).flatten())


def tokens() -> Tensor:
    """Return ids [s, b]."""
    return torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=torch.Generator().manual_seed(9))


def gradients(student: nn.Module) -> dict[str, Tensor]:
    """Return every parameter's gradient."""
    return {
        name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_gradients_are_those_of_the_loss_with_the_weighted_term_added(weight: float) -> None:
    objective = AlignmentObjective(LetSchedule(weight, 10), student_layer=1)
    records: list[AlignmentSums] = []
    with_node, explicit = Student(), Student()
    aim = target(0.0, ignore)
    scale = objective.gradient_scale(5, loss_scale=1.0, num_tokens=aim.mask.sum(), num_microbatches=1)
    loss = with_node(tokens(), lambda h: add_alignment_gradient(h, target(scale, records.append)))
    loss.backward()

    seen: list[Tensor] = []
    plain_loss = explicit(tokens(), lambda h: seen.append(h) or h)  # type: ignore[func-returns-value]
    cosine = cosine_similarity(seen[0], interpolate(aim.states, size=WIDTH, mode="linear"), dim=-1)
    projection = -(cosine * aim.mask).sum() / aim.mask.sum()
    (plain_loss + weight * 0.5 * projection).backward()

    assert torch.equal(loss, plain_loss)  # the node is an identity in forward
    assert gradients(with_node).keys() == gradients(explicit).keys()
    for name, gradient in gradients(explicit).items():
        # 1e-6: fp32 rounding of gradients of size 0.1 to 1, summed in another order
        torch.testing.assert_close(gradients(with_node)[name], gradient, rtol=0, atol=1e-6)
    assert len(records) == 1
    torch.testing.assert_close(
        records[0].loss().float(), projection.detach(), rtol=0, atol=1e-6
    )  # fp32 rounding
    assert not records[0].loss_sum.requires_grad


def test_layers_above_are_untouched_and_layers_below_are_not() -> None:
    plain, aligned = Student(), Student()
    plain(tokens(), lambda h: h).backward()
    aligned(tokens(), lambda h: add_alignment_gradient(h, target(1.0, ignore))).backward()
    for name, gradient in gradients(plain).items():
        is_below = name.startswith(("embedding", "blocks.0"))
        assert torch.equal(gradients(aligned)[name], gradient) != is_below, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_changes_nothing_and_records_once(use_reentrant: bool) -> None:
    def recomputed(chunk: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return checkpoint(chunk, hidden, use_reentrant=use_reentrant)

    kept, again = Student(), Student()
    kept_records: list[AlignmentSums] = []
    again_records: list[AlignmentSums] = []
    passes: list[bool] = []

    def align_again(hidden: Tensor) -> Tensor:
        passes.append(hidden.requires_grad)
        return add_alignment_gradient(hidden, target(0.3, again_records.append))

    kept(tokens(), lambda h: add_alignment_gradient(h, target(0.3, kept_records.append))).backward()
    again(tokens(), align_again, recomputed).backward()
    assert len(passes) == 2, "the chunk must have run twice for this test to mean anything"
    assert len(again_records) == len(kept_records) == 1
    assert torch.equal(again_records[0].to_vector(), kept_records[0].to_vector())
    for name, gradient in gradients(kept).items():
        assert torch.equal(gradients(again)[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_gradient_comes_back_in_the_hidden_dtype_rounded_once(
    dtype: torch.dtype, scale: float | Tensor
) -> None:
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH).to(dtype).requires_grad_()
    incoming = torch.randn(SEQUENCE, BATCH, WIDTH).to(dtype)
    aim = target(scale, ignore)
    output = add_alignment_gradient(hidden, aim)
    assert torch.equal(output, hidden)
    assert output.dtype == dtype
    output.backward(incoming)
    leaf = hidden.detach().float().requires_grad_()
    (alignment,) = torch.autograd.grad(cosine_alignment(leaf, aim.states, aim.mask).loss_sum, leaf)
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert torch.equal(hidden.grad, (incoming.float() + 0.25 * alignment).to(dtype))


def test_under_fp16_the_loss_scale_comes_before_the_cast() -> None:
    loss_scale, tiny = (
        65536.0,
        1e-8,
    )  # w / (n * num_microbatches) of a large batch: below fp16's smallest number
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH).half().requires_grad_()
    aim = target(torch.tensor(loss_scale) * tiny, ignore)
    add_alignment_gradient(hidden, aim).backward(torch.zeros(SEQUENCE, BATCH, WIDTH).half())
    leaf = hidden.detach().float().requires_grad_()
    (alignment,) = torch.autograd.grad(cosine_alignment(leaf, aim.states, aim.mask).loss_sum, leaf)
    assert hidden.grad is not None
    # fp16 keeps 11 bits down to 6e-5 and a step of 6e-8 below; the values here are about 1e-4
    torch.testing.assert_close(hidden.grad.float(), alignment * tiny * loss_scale, rtol=2**-11, atol=2**-25)
    assert not (alignment * tiny).half().any(), "without the scale nothing would be left"


def test_output_survives_the_pipelines_pseudo_deallocation() -> None:
    inputs = torch.randn(SEQUENCE, BATCH, WIDTH, requires_grad=True)
    aim = target(1.0, ignore)
    expected = torch.autograd.grad(add_alignment_gradient(inputs * 2, aim).sum(), inputs)[0]
    output = add_alignment_gradient(inputs * 2, aim)
    assert output._base is None  # what megatron-core's deallocate_output_tensor asserts
    incoming = torch.ones_like(output)
    output.data = torch.empty((1,))
    # megatron-core's custom_backward: the engine itself, which does not compare the shapes of output and gradient
    torch.autograd.Variable._execution_engine.run_backward(
        (output,), (incoming,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, expected)


def test_output_of_a_view_has_no_base_either() -> None:
    inputs = torch.randn(SEQUENCE * BATCH, WIDTH, requires_grad=True)
    output = add_alignment_gradient((inputs * 2).view(SEQUENCE, BATCH, WIDTH), target(1.0, ignore))
    assert output._base is None
    assert output.requires_grad


def test_hidden_without_gradient_passes_untouched() -> None:
    records: list[AlignmentSums] = []
    frozen = torch.randn(SEQUENCE, BATCH, WIDTH)
    assert add_alignment_gradient(frozen, target(1.0, records.append)) is frozen
    with torch.no_grad():
        needs = torch.randn(SEQUENCE, BATCH, WIDTH, requires_grad=True)
        assert add_alignment_gradient(needs, target(1.0, records.append)) is needs
    assert records == []


def test_hidden_changed_in_place_is_noticed() -> None:
    inputs = torch.randn(SEQUENCE, BATCH, WIDTH, requires_grad=True)
    output = add_alignment_gradient(inputs * 2, target(1.0, ignore))
    output.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_any_differentiable_loss_can_take_the_cosines_place() -> None:
    def squared(hidden: Tensor, states: Tensor, mask: Tensor) -> AlignmentSums:
        cosine = cosine_alignment(hidden, states, mask)
        loss_sum = (hidden.square().sum(-1) * mask).sum()
        return AlignmentSums(**{**cosine.__dict__, "loss_sum": loss_sum})

    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, requires_grad=True)
    aim = target(0.5, ignore)
    aim = AlignmentTarget(aim.states, aim.mask, 0.5, ignore, loss=squared)
    add_alignment_gradient(hidden, aim).backward(torch.zeros(SEQUENCE, BATCH, WIDTH))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, hidden.detach() * aim.mask[..., None])


def test_a_fully_masked_microbatch_leaves_the_gradient_as_it_is() -> None:
    records: list[AlignmentSums] = []
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, requires_grad=True)
    aim = target(1.0, ignore)
    add_alignment_gradient(
        hidden, AlignmentTarget(aim.states, torch.zeros(SEQUENCE, BATCH), 1.0, records.append)
    ).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.ones_like(hidden))
    assert float(records[0].count) == 0.0


def test_tokens_of_hidden_states_and_mask_must_agree() -> None:
    hidden = torch.randn(SEQUENCE, BATCH + 1, WIDTH, requires_grad=True)
    with pytest.raises(AssertionError, match="same tokens"):
        add_alignment_gradient(hidden, target(1.0, ignore))


def test_gradient_scale_follows_both_ways_of_averaging() -> None:
    objective = AlignmentObjective(LetSchedule(0.5, 4), student_layer=2)
    # all exact in fp32: powers of two
    assert objective.gradient_scale(2, loss_scale=8.0, num_tokens=16, num_microbatches=4) == 8 * 0.25 / 64
    assert objective.gradient_scale(0, loss_scale=8.0, num_tokens=0, num_microbatches=4) == 8 * 0.5 / 4
    assert objective.gradient_scale(4, loss_scale=8.0, num_tokens=16, num_microbatches=4) == 0.0
    on_device = objective.gradient_scale(
        2, loss_scale=torch.tensor(8.0), num_tokens=torch.tensor(16), num_microbatches=4
    )
    assert isinstance(on_device, Tensor)
    assert float(on_device) == 8 * 0.25 / 64
    nothing = objective.gradient_scale(0, loss_scale=8.0, num_tokens=torch.tensor(0), num_microbatches=4)
    assert float(nothing) == 8 * 0.5 / 4
    undivided = objective.gradient_scale(
        2, loss_scale=8.0, num_tokens=16, num_microbatches=4, calculate_per_token_loss=True
    )
    assert undivided == 8 * 0.25


def test_microbatches_and_sequence_slices_add_up_to_the_whole() -> None:
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH)
    aim = target(1.0, ignore)
    count = aim.mask.sum()

    def mean_gradient(pieces: list[tuple[slice, slice]]) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        for rows in pieces:
            part = AlignmentTarget(aim.states[rows], aim.mask[rows], 1.0 / count, ignore)
            output = add_alignment_gradient(leaf[rows], part)
            output.backward(torch.zeros_like(output))
        assert leaf.grad is not None
        return leaf.grad

    whole, half = slice(None), SEQUENCE // 2
    by_sequence = mean_gradient([(slice(0, half), whole), (slice(half, None), whole)])
    by_batch = mean_gradient([(whole, slice(0, 1)), (whole, slice(1, None))])
    together = mean_gradient([(whole, whole)])
    # 1e-7: each token's gradient is the same arithmetic; reductions over the width may be blocked differently
    torch.testing.assert_close(by_sequence, together, rtol=0, atol=1e-7)
    torch.testing.assert_close(by_batch, together, rtol=0, atol=1e-7)
