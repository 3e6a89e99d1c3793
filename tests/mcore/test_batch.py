"""Masks, positions and slices of a microbatch against megatron-core's own rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import megatron.core.utils as mcore_utils
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_let.config.data import DataConfig
from megatron_let.mcore.batch import (
    build_microbatch,
    context_parallel_slice,
    find_document_starts,
    sequence_parallel_slice,
)
from megatron_let.mcore.parallel import ParallelContext

EOD = 3
ContextMaker = Callable[..., ParallelContext]
# Few ids, so that ends of document come first, last, in a row and not at all.
ROWS = st.lists(st.lists(st.integers(0, 4), min_size=8, max_size=8), min_size=1, max_size=3)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
def test_masks_and_positions_are_those_of_megatron_core(
    flags: tuple[bool, bool, bool], context_of: ContextMaker
) -> None:
    reset_positions, reset_mask, mask_eod = flags
    data = DataConfig(
        reset_position_ids=reset_positions, reset_attention_mask=reset_mask, eod_mask_loss=mask_eod
    )
    context = context_of()

    @settings(max_examples=60, deadline=None)
    @given(ROWS)
    def check(rows: list[list[int]]) -> None:
        tokens = torch.tensor(rows)
        batch = build_microbatch(tokens, tokens + 1, eod=EOD, data=data, context=context)
        for index, row in enumerate(tokens):
            mask, loss_mask, positions = _get_ltor_masks_and_position_ids(
                row, EOD, reset_positions, reset_mask, mask_eod, True
            )
            assert torch.equal(batch.loss_mask[index], loss_mask)
            assert torch.equal(batch.position_ids[index], positions)
            if reset_mask:
                assert batch.attention_mask is not None
                assert torch.equal(batch.attention_mask[index], mask)
            else:
                assert batch.attention_mask is None
                assert torch.equal(mask[0], torch.ones(8, 8).triu(1).bool())
        assert torch.equal(batch.tokens, tokens)
        assert torch.equal(batch.labels, tokens + 1)
        assert torch.equal(batch.full_tokens, tokens)
        assert (batch.document_starts is not None) == reset_mask

    check()


def test_a_document_starts_at_the_first_token_and_after_each_end() -> None:
    tokens = torch.tensor([[EOD, 1, EOD, EOD, 2], [1, 2, 1, 2, EOD]])
    expected = [[True, True, False, True, True], [True, False, False, False, False]]
    assert find_document_starts(tokens, EOD).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 4])
def test_context_parallel_ranks_get_the_chunks_megatron_core_gives_them(size: int) -> None:
    tensor = torch.arange(2 * 16 * 3).view(2, 16, 3)
    for rank in range(size):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: size)
        with (
            patch.object(mcore_utils, "get_pg_size", lambda group: group.size()),
            patch.object(mcore_utils, "get_pg_rank", lambda group: group.rank()),
        ):
            expected = mcore_utils.get_batch_on_this_cp_rank({"tokens": tensor.clone()}, group)["tokens"]
        assert torch.equal(context_parallel_slice(tensor, dim=1, rank=rank, size=size), expected)
        moved = context_parallel_slice(tensor.transpose(0, 1), dim=0, rank=rank, size=size)
        assert torch.equal(moved.transpose(0, 1), expected)


def test_a_context_parallel_rank_keeps_its_share_but_the_teacher_reads_all(context_of: ContextMaker) -> None:
    tokens = torch.randint(0, 5, (2, 16))
    data = DataConfig(eod_mask_loss=True, reset_position_ids=True)
    whole = build_microbatch(tokens, tokens + 1, eod=EOD, data=data, context=context_of())
    seen = []
    for rank in range(2):
        context = context_of(cp_rank=rank, cp_size=2)
        share = build_microbatch(tokens, tokens + 1, eod=EOD, data=data, context=context)
        assert torch.equal(share.full_tokens, tokens)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            expected = context_parallel_slice(getattr(whole, name), dim=1, rank=rank, size=2)
            assert torch.equal(getattr(share, name), expected)
        positions = context_parallel_slice(torch.arange(16)[None], dim=1, rank=rank, size=2)
        seen.extend(positions[0].tolist())
    assert sorted(seen) == list(range(16))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sequence_parallel_slices_are_contiguous_and_cover_the_sequence(size: int) -> None:
    tensor = torch.arange(8 * 3).view(8, 3)
    slices: list[Any] = [sequence_parallel_slice(tensor, dim=0, rank=rank, size=size) for rank in range(size)]
    assert all(len(piece) == 8 // size for piece in slices)
    assert torch.equal(torch.cat(slices), tensor)
