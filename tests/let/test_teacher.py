"""Cutting rows into segments, with a teacher whose states can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_let.let import Teacher, segment_states


class PrefixSumTeacher(Teacher):
    """Its state of a token: the sum of (position + 1) * id over the prefix, and the position; exact in integers."""

    def __init__(self, context_length: int | None = None) -> None:
        self._context_length = context_length
        self.shapes: list[tuple[int, int]] = []

    @property
    def hidden_size(self) -> int:
        return 2

    @property
    def vocab_size(self) -> int:
        return 1000

    @property
    def context_length(self) -> int | None:
        return self._context_length

    @property
    def description(self) -> str:
        return "prefix sums"

    def states(self, tokens: Tensor) -> Tensor:
        assert self._context_length is None or tokens.shape[1] <= self._context_length
        assert tokens.min() > 0, "padding must be a token of the segment"
        self.shapes.append((tokens.shape[0], tokens.shape[1]))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return torch.stack([((positions + 1) * tokens).cumsum(1), positions], dim=-1).float()

    def to(self, device: torch.device | str) -> PrefixSumTeacher:
        return self

    def parameters(self) -> Iterator[Tensor]:
        return iter(())


def one_by_one(tokens: Tensor, starts: Tensor | None, window: int) -> Tensor:
    """The slow definition: walk each row, begin again at a document's start and after `window` tokens."""
    output = torch.empty(*tokens.shape, 2)
    for row in range(tokens.shape[0]):
        begin = 0
        for column in range(tokens.shape[1]):
            if (starts is not None and bool(starts[row, column])) or column - begin == window:
                begin = column
            segment = tokens[row, begin : column + 1]
            output[row, column, 0] = (segment * torch.arange(1, len(segment) + 1)).sum()
            output[row, column, 1] = column - begin
    return output


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, 1000, (rows, length))


@pytest.mark.parametrize("context", [None, 24, 25, 1000])
def test_rows_within_the_context_are_one_plain_forward(context: int | None) -> None:
    teacher, tokens = PrefixSumTeacher(context), random_tokens(3, 24)
    assert torch.equal(segment_states(teacher, tokens), one_by_one(tokens, None, 24))
    assert teacher.shapes == [(3, 24)]


def test_whole_windows_are_one_reshaped_forward() -> None:
    teacher, tokens = PrefixSumTeacher(8), random_tokens(3, 24)
    assert torch.equal(segment_states(teacher, tokens), one_by_one(tokens, None, 8))
    assert teacher.shapes == [(9, 8)]


def test_a_remainder_is_a_window_of_its_own() -> None:
    teacher, tokens = PrefixSumTeacher(7), random_tokens(3, 24)
    assert torch.equal(segment_states(teacher, tokens), one_by_one(tokens, None, 7))
    assert teacher.shapes == [(9, 7), (3, 3)]


def test_a_sliced_row_need_not_be_contiguous() -> None:
    tokens = random_tokens(24, 4).t()
    assert torch.equal(segment_states(PrefixSumTeacher(8), tokens), one_by_one(tokens, None, 8))


@pytest.mark.parametrize("context", [None, 5, 16, 24])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_nothing_is_seen_across_documents_and_windows(context: int | None, density: float) -> None:
    teacher, tokens = PrefixSumTeacher(context), random_tokens(4, 24)
    starts = torch.rand(4, 24) < density
    starts[0] = False  # a row without a start of its own
    starts[1, 0] = True
    starts[2, 23] = True
    before = starts.clone()
    ours = segment_states(teacher, tokens, starts)
    assert torch.equal(ours, one_by_one(tokens, starts, context or 24))
    assert torch.equal(starts, before)


def test_rows_without_documents_take_the_plain_forward() -> None:
    teacher, tokens = PrefixSumTeacher(), random_tokens(3, 24)
    starts = torch.zeros(3, 24, dtype=torch.bool)
    starts[:, 0] = True
    segment_states(teacher, tokens, starts)
    assert teacher.shapes == [(3, 24)]


def test_padding_stays_under_half_of_the_work() -> None:
    for density in (0.005, 0.02, 0.1, 0.5):
        teacher, tokens = PrefixSumTeacher(300), random_tokens(8, 512)
        starts = torch.rand(8, 512) < density
        segment_states(teacher, tokens, starts)
        done = sum(rows * length for rows, length in teacher.shapes)
        assert tokens.numel() <= done < 2 * tokens.numel()
        assert len(teacher.shapes) <= 10  # one forward per power of two up to the context
