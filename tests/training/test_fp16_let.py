"""fp16's loss scaling with LET: the alignment gradient is scaled as the student's is, and overflows as it does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.one_iteration import Tensors, run_one_iteration
from megatron_let.testing.training import TINY_STUDENT, arguments, training_rows
from tests.training.injected import Fault, Told
from tests.training.test_bad_numbers import run

# fp16 keeps 11 bits, a rounding is 0.05 %; the norm of a difference of two backward passes gathers many.
HALF = 0.02
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-process": (1, {}),
    "pp2": (2, {"--pipeline-model-parallel-size": 2}),
    "tp2-sp": (2, {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}),
}


def fp16(scale: float, **changes: Any) -> dict[str, Any]:
    return {
        "--fp16": None,
        "--initial-loss-scale": scale,
        "--min-loss-scale": 1,
        "--hysteresis": 1,
        **changes,
    }


def alignment_gradient(pool: RankPool, base: dict[str, Any], layout: str, changes: dict[str, Any]) -> Tensors:
    """Return what LET adds to the gradients: with it minus without it, as the optimizer is given them."""
    world_size, on_layout = LAYOUTS[layout]
    both = []
    for weight in (3.0, 0.0):
        words = {**base, **on_layout, **changes, "--let-stop-iters": 1, "--let-weight": weight}
        both.append(pool.run(world_size, run_one_iteration, arguments(TINY_STUDENT, words))[0].gradients)
    return {name: both[0][name] - both[1][name] for name in both[0]}


@pytest.mark.parametrize("layout", ["one-process", "tp2-sp"])
def test_the_alignment_gradient_is_that_of_fp32_times_the_scale(
    layout: str, pool: RankPool, let_from_start: dict[str, Any]
) -> None:
    """It reaches layers 1 and 2 and the embedding; a forgotten scale would be off by a factor of 64 and more."""
    expected = alignment_gradient(pool, let_from_start, "one-process", {})
    for scale in (64.0, 4096.0) if layout == "one-process" else (4096.0,):
        actual = alignment_gradient(pool, let_from_start, layout, fp16(scale))
        for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"):
            ours = actual[name][: len(expected[name])]  # two ranks pad the vocabulary further
            difference = ours / scale - expected[name][: len(ours)]
            assert float(difference.norm()) < HALF * float(expected[name].norm())
        assert float(torch.stack([actual[n].norm() for n in actual if "layers.3" in n]).max()) == 0


@pytest.mark.parametrize("layout", ["one-process", "pp2"])
def test_an_overflow_of_lets_gradient_alone_lowers_the_scale_and_is_no_bad_number(
    layout: str, pool: RankPool, let_from_start: dict[str, Any], tmp_path: Path
) -> None:
    """At a scale of 2^14 the student's own gradients fit into fp16; those of LET at weight 3,000 do not."""
    world_size, on_layout = LAYOUTS[layout]
    base = {
        **let_from_start,
        **on_layout,
        **fp16(2.0**14),
        "--mock-data": False,
        "--max-skipped-iterations": 1,
    }
    let = {"--let-stop-iters": 8, "--train-iters": 8}
    if layout == "one-process":
        plain = run(pool, Fault("nowhere", ()), {**base, **let, "--let-weight": 0.0}, world_size=world_size)
        assert plain.iterations[-1][2:] == (0, 0)
    changes = {**base, **let, "--let-weight": 3000.0, "--save": tmp_path}
    told = run(pool, Fault("nowhere", ()), changes, world_size=world_size)
    skipped = [row[2] for row in told.iterations]
    assert told.code == 0
    assert 0 < skipped[-1] < 8
    assert skipped[0] == 1
    assert told.iterations[-1][3] == 0
    assert told.loss_scales == [2.0**14 / 2**count for count in skipped]
    assert told.is_changed() == updates(told)
    assert [row["nan_iterations"] for row in training_rows(tmp_path)] == [0] * 8


def updates(told: Told) -> list[bool]:
    """Return for each iteration whether it changed something: after an overflow the optimizer holds still."""
    skipped = [row[2] for row in told.iterations]
    return [after == before for before, after in itertools.pairwise([0, *skipped])]


def test_an_overflow_at_the_smallest_scale_is_a_bad_number(pool: RankPool) -> None:
    changes = {
        **fp16(2.0**24),
        "--min-loss-scale": 2.0**23,
        "--max-skipped-iterations": 2,
        "--train-iters": 6,
    }
    told = run(pool, Fault("nowhere", ()), changes)
    assert told.code == 4
    assert told.iterations == [(1, 8, 1, 0), (2, 16, 2, 1), (3, 24, 3, 2)]
    assert told.loss_scales == [2.0**23] * 3
    assert "gradient inf in " in told.error


def test_a_bad_loss_is_not_the_scalers_business(pool: RankPool) -> None:
    told = run(pool, Fault("embedding", (2,)), fp16(64.0))
    assert told.iterations[-1][2:] == (1, 1)
    assert told.loss_scales == [64.0] * 5
    assert told.warnings("lm loss nan, first on rank 0")
