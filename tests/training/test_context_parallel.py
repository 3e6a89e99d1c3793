"""LET on a context-parallel rank, as far as it goes without Transformer Engine: what is aligned, and by what it is divided."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch

from megatron_let.config.data import DataConfig
from megatron_let.let import AlignmentObjective, AlignmentTarget, LetSchedule, Teacher
from megatron_let.mcore.batch import build_microbatch
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.training import alignment as alignment_module
from megatron_let.training.alignment import Alignment

EOD, STUDENT_LAYER, LOSS_SCALE, NUM_MICROBATCHES = 3, 2, 8.0, 3
WEIGHT = 0.5 * (4 - 1) / 4  # of 0.5 after one of four iterations
# 16 positions in four chunks: rank 0 of 2 has the outer two, rank 1 the inner two.
SHARES = {0: [0, 1, 2, 3, 12, 13, 14, 15], 1: [4, 5, 6, 7, 8, 9, 10, 11]}
# [b, s], every token its own id but for the ends of documents: 3 among the outer chunks, 1 among the inner
TOKENS = torch.arange(4, 36).view(2, 16)
for row, position in ((0, 1), (0, 2), (1, 13), (1, 5)):
    TOKENS[row, position] = EOD
NUM_COUNTED = {0: 13, 1: 15}


class TellingTeacher(Teacher):
    """Gives (id, position) as a token's state and remembers what it read."""

    hidden_size, vocab_size, context_length, description = 2, 64, None, "telling"

    def __init__(self) -> None:
        self.read: list[torch.Tensor] = []

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        self.read.append(tokens)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return torch.stack([tokens, positions], dim=-1).float()

    def to(self, device: torch.device | str) -> Teacher:
        return self

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter(())


class Layer(torch.nn.Module):
    """Stands for layer k."""

    layer_number = STUDENT_LAYER

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return hidden, None


def target_of(context: ParallelContext, *, is_sequence_parallel: bool, is_per_token: bool) -> AlignmentTarget:
    """Take one microbatch through Alignment on the rank that `context` describes; return what layer k meets."""
    layer, teacher, targets = Layer(), TellingTeacher(), []
    chunk = SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))
    student: Any = SimpleNamespace(core_config=SimpleNamespace(hidden_size=4), gpt_chunks=[chunk])

    def attach(hidden: torch.Tensor, target: AlignmentTarget) -> torch.Tensor:
        targets.append(target)
        return hidden

    with patch.object(alignment_module, "add_alignment_gradient", attach):
        alignment = Alignment(
            AlignmentObjective(LetSchedule(0.5, 4), STUDENT_LAYER),
            student,
            context,
            teacher,
            is_sequence_parallel=is_sequence_parallel,
            calculate_per_token_loss=is_per_token,
            all_reduce_sum=lambda numbers: numbers,  # there are no peers
        )
    data = DataConfig(eod_mask_loss=True)
    batch = build_microbatch(TOKENS, TOKENS + 1, eod=EOD, data=data, context=context)
    alignment.begin_iteration(1, num_microbatches=NUM_MICROBATCHES, loss_scale=LOSS_SCALE)
    alignment.prepare(0, batch)
    layer(torch.zeros(8, 2, 4))
    alignment.end_iteration()
    assert len(teacher.read) == 1
    assert torch.equal(teacher.read[0], TOKENS), "the teacher reads whole rows: its attention needs them"
    return cast(AlignmentTarget, targets[0])


def assert_describes(target: AlignmentTarget, positions: list[int]) -> None:
    """Assert that states [s, b, d_t] and mask [s, b] are those of these positions, in this order."""
    tokens = TOKENS[:, positions].T  # [s, b]
    at = torch.tensor(positions)[:, None].expand_as(tokens)
    assert torch.equal(target.states, torch.stack([tokens, at], dim=-1).float())
    assert torch.equal(target.mask, (tokens != EOD).float())


@pytest.mark.parametrize("cp_rank", SHARES)
def test_a_rank_aligns_its_two_chunks_and_divides_by_their_count(
    cp_rank: int, context_of: Callable[..., ParallelContext]
) -> None:
    context = context_of(cp_rank=cp_rank, cp_size=2)
    target = target_of(context, is_sequence_parallel=False, is_per_token=False)
    assert_describes(target, SHARES[cp_rank])
    expected = LOSS_SCALE * WEIGHT / (NUM_COUNTED[cp_rank] * NUM_MICROBATCHES)
    assert float(target.gradient_scale) == pytest.approx(expected, rel=1e-6)  # fp32


@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("cp_rank", SHARES)
def test_sequence_parallel_slices_the_share_but_not_its_count(
    cp_rank: int, tp_rank: int, context_of: Callable[..., ParallelContext]
) -> None:
    context = context_of(cp_rank=cp_rank, cp_size=2, tp_rank=tp_rank, tp_size=2)
    target = target_of(context, is_sequence_parallel=True, is_per_token=False)
    positions = SHARES[cp_rank][4 * tp_rank : 4 * tp_rank + 4]
    assert_describes(target, positions)
    num_in_slice = int(target.mask.sum())
    assert num_in_slice < NUM_COUNTED[cp_rank]
    expected = LOSS_SCALE * WEIGHT / (NUM_COUNTED[cp_rank] * NUM_MICROBATCHES)
    assert float(target.gradient_scale) == pytest.approx(expected, rel=1e-6)  # fp32
    # views would keep every tensor-parallel rank's states in memory until backward
    assert target.states.is_contiguous()
    assert target.states.untyped_storage().nbytes() == target.states.nbytes


@pytest.mark.parametrize("cp_rank", SHARES)
def test_per_token_averaging_is_left_to_the_schedule(
    cp_rank: int, context_of: Callable[..., ParallelContext]
) -> None:
    context = context_of(cp_rank=cp_rank, cp_size=2)
    target = target_of(context, is_sequence_parallel=False, is_per_token=True)
    assert_describes(target, SHARES[cp_rank])
    assert float(target.gradient_scale) == LOSS_SCALE * WEIGHT


def test_without_tensor_parallel_slices_every_tensor_parallel_rank_aligns_the_share(
    context_of: Callable[..., ParallelContext],
) -> None:
    context = context_of(cp_rank=1, cp_size=2, tp_rank=1, tp_size=2)
    target = target_of(context, is_sequence_parallel=False, is_per_token=False)
    assert_describes(target, SHARES[1])
