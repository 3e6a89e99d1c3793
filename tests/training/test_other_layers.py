"""A checkpoint goes from the stock layers to Transformer Engine's and back, whose norms have a state of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_let.errors import EXIT_DONE
from megatron_let.mcore.dcp_metadata import read_metadata
from megatron_let.mcore.stock_layers import StockNorm
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, assert_bitwise, train


def train_with_norms_that_have_a_state(argv: Sequence[str]) -> tuple[int, set[bytes]]:
    """Train on this rank with norms as Transformer Engine's are; return the exit code and the states they were given."""
    given: set[bytes] = set()

    def get_state(_: StockNorm) -> torch.Tensor:
        return torch.tensor([7], dtype=torch.uint8)

    def set_state(_: StockNorm, state: torch.Tensor) -> None:
        given.add(bytes(state.tolist()))

    with (
        patch.object(StockNorm, "get_extra_state", get_state),
        patch.object(StockNorm, "set_extra_state", set_state),
        patch(
            "megatron_let.mcore.checkpoint.check_extra_states"
        ),  # it would look for an FP8 state in these bytes
    ):
        return train(argv), given


def norm_states(directory: Path) -> list[str]:
    """Return the names of the final norm's states in a checkpoint."""
    names = read_metadata(directory).state_dict_metadata
    return [name for name in names if name.startswith("decoder.final_layernorm._extra_state")]


def test_extra_states_that_a_checkpoint_lacks_stay_as_they_are(
    pool: RankPool, token_files: Path, start: Path, tmp_path: Path
) -> None:
    def words(load: Path, save: str, iterations: int) -> list[str]:
        changes: dict[str, Any] = {
            "--data-path": token_files,
            "--train-iters": iterations,
            "--override-opt-param-scheduler": None,
            "--load": load,
            "--save": tmp_path / save,
        }
        return arguments(TINY_STUDENT, changes)

    assert pool.run(1, train, words(start, "stock", 3)) == [EXIT_DONE]
    assert pool.run(1, train_with_norms_that_have_a_state, words(start, "other", 3)) == [(EXIT_DONE, {b"\7"})]
    assert norm_states(start / "iter_0000002") == []
    assert len(norm_states(tmp_path / "other" / "iter_0000003")) == 1

    assert pool.run(1, train, words(tmp_path / "stock", "stock again", 4)) == [EXIT_DONE]
    assert pool.run(1, train, words(tmp_path / "other", "back", 4)) == [EXIT_DONE]
    assert_bitwise(tmp_path / "stock again", tmp_path / "back", 4)
