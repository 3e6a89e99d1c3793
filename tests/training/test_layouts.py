"""LET on every parallel layout against the same run on one process: losses, cosines, gradient norms, final weights.

fp32 on CPU. Sums are added up in another order on another layout, so the comparison is to 1e-5 relative (some hundred
roundings of 6e-8) for losses and norms, and to 2e-5 absolute for weights after five Adam steps at 3e-3: Adam divides
by the root of the second moment, which amplifies roundings of near-zero gradients, yet a wrong gradient moves weights
by whole steps (1e-3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    largest_difference,
    model_tensors,
    training_rows,
)
from tests.training.observed import Effects, counted_tokens, train_and_observe

RELATIVE = 1e-5
WEIGHTS = 2e-5
COMPARED = ("lm_loss", "let_loss", "let_cosine", "let_cosine_centered", "grad_norm", "let_weight")


@dataclass(frozen=True)
class Layout:
    """A layout, how it is asked for, and what a rank must find itself in then."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    effects: Effects = field(default_factory=Effects)

    @property
    def world_size(self) -> int:
        return math.prod(self.effects.tp_pp_dp)

    def __str__(self) -> str:
        return self.name


TP2 = {"--tensor-model-parallel-size": 2}
TP2_SP = {**TP2, "--sequence-parallel": None}
PP2 = {"--pipeline-model-parallel-size": 2}
VPP = {**PP2, "--num-layers-per-virtual-pipeline-stage": 1}
SHARDED = {"--use-distributed-optimizer": None}
OVERLAP = {"--overlap-grad-reduce": None, "--overlap-param-gather": None, "--ddp-bucket-size": 20000}

ON_TP2, ON_PP2, ON_DP2 = (Effects(tp_pp_dp=sizes) for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2)))
ON_TP2_SP = Effects(tp_pp_dp=(2, 1, 1), is_sequence_parallel=True, rows=16)
TWICE = (2.0, 2.0)  # recomputed: layer k and its attention run once more in backward


def k(student_layer: int) -> dict[str, Any]:
    return {"--let-student-layer": student_layer}


def full(method: str, num_layers: int) -> dict[str, Any]:
    granularity = {"--recompute-granularity": "full"}
    return {**granularity, "--recompute-method": method, "--recompute-num-layers": num_layers}


LAYOUTS = [
    Layout("tp2", TP2, ON_TP2),
    Layout("tp2-sp", TP2_SP, ON_TP2_SP),
    Layout("pp2-k-first", {**PP2, **k(2)}, ON_PP2),
    Layout("pp2-k-last", {**PP2, **k(4)}, ON_PP2),
    Layout("pp4", {"--pipeline-model-parallel-size": 4, **k(3)}, Effects(tp_pp_dp=(1, 4, 1))),
    *(
        Layout(f"pp2-vp2-k{layer}", {**VPP, **k(layer)}, replace(ON_PP2, num_chunks=2))
        for layer in (1, 2, 3, 4)
    ),
    Layout("dp2", {}, ON_DP2),
    Layout("dp2-distributed-optimizer", SHARDED, replace(ON_DP2, is_optimizer_distributed=True)),
    Layout(
        "dp2-overlap",
        {**SHARDED, **OVERLAP},
        replace(
            ON_DP2,
            is_optimizer_distributed=True,
            are_gradients_overlapped=True,
            are_parameters_overlapped=True,
        ),
    ),
    Layout("tp2-pp2-sp", {**TP2_SP, **PP2, **k(3)}, replace(ON_TP2_SP, tp_pp_dp=(2, 2, 1))),
    Layout("tp2-dp2", TP2, Effects(tp_pp_dp=(2, 1, 2))),
    Layout(
        "selective-recompute",
        {"--recompute-granularity": "selective"},
        Effects(recompute=("selective", None, None), passes=(1.0, 2.0)),
    ),
    Layout("full-uniform", full("uniform", 2), Effects(recompute=("full", "uniform", 2), passes=TWICE)),
    Layout(
        "full-uniform-k-inside-a-unit",  # layers 1 to 4 are recomputed in one go
        {**full("uniform", 4), **k(2)},
        Effects(recompute=("full", "uniform", 4), passes=TWICE),
    ),
    Layout("full-block", full("block", 2), Effects(recompute=("full", "block", 2), passes=TWICE)),
    Layout(
        "full-block-k-outside",  # layers 1 and 2 are recomputed, k = 3 keeps its activations
        {**full("block", 2), **k(3)},
        Effects(recompute=("full", "block", 2)),
    ),
    Layout(
        "pp2-full-uniform",
        {**PP2, **full("uniform", 1), **k(3)},
        replace(ON_PP2, recompute=("full", "uniform", 1), passes=TWICE),
    ),
    Layout(
        "pp2-vp2-full-block",
        {**VPP, **full("block", 1), **k(3)},
        replace(ON_PP2, num_chunks=2, recompute=("full", "block", 1), passes=TWICE),
    ),
]
AVERAGING: dict[str, dict[str, Any]] = {
    "mean-of-microbatches": {},
    "per-token": {"--calculate-per-token-loss": None},
    "one-microbatch": {"--micro-batch-size": 8},
}


class References:
    """Runs of LET from one start checkpoint, each made once."""

    def __init__(self, pool: RankPool, base: dict[str, Any], root: Path) -> None:
        self._pool, self._base, self._root = pool, base, root
        self._effects: dict[str, set[Effects | None]] = {}

    def run(self, world_size: int, changes: dict[str, Any], name: str) -> tuple[Path, set[Effects | None]]:
        """Train; return the save directory and what the ranks' settings came to, None away from layer k's stage."""
        directory = self._root / name
        if name not in self._effects:
            words = arguments(TINY_STUDENT, {**self._base, **changes, "--save": directory})
            self._effects[name] = set(self._pool.run(world_size, train_and_observe, words))
        return directory, self._effects[name]

    def counted_tokens(self) -> list[int]:
        """Return the counted tokens of each sample that the runs read."""
        return self._pool.run(1, counted_tokens, arguments(TINY_STUDENT, self._base))[0]


@pytest.fixture(scope="session")
def runs(
    pool: RankPool, let_from_start: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> References:
    """Return the maker of runs: LET from one start checkpoint, five iterations, differing loss masks."""
    base = {
        **let_from_start,
        "--let-weight": 1.0,
        "--let-stop-iters": 5,
    }
    return References(pool, base, tmp_path_factory.mktemp("layouts"))


def assert_same_run(
    reference: Path, other: Path, *, relative: float = RELATIVE, weights: float = WEIGHTS
) -> None:
    """Assert that two runs logged the same numbers and ended with the same weights."""
    expected, actual = training_rows(reference), training_rows(other)
    assert len(expected) == len(actual) == 5
    for left, right in zip(expected, actual, strict=True):
        assert left["let_weight"] > 0
        assert left["let_cosine"] is not None, "a comparison of nothing"
        for key in COMPARED:
            assert right[key] == pytest.approx(left[key], rel=relative, abs=relative), (
                left["iteration"],
                key,
            )
    difference = largest_difference(
        model_tensors(reference / "iter_0000005"), model_tensors(other / "iter_0000005")
    )
    assert difference <= weights


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_reproduces_the_one_process_run(layout: Layout, averaging: str, runs: References) -> None:
    changes = dict(AVERAGING[averaging])
    if averaging == "one-microbatch" and layout.world_size > 1 and "dp2" in layout.name:
        changes = {"--micro-batch-size": 4}
    if averaging == "one-microbatch" and "vp2" in layout.name:
        pytest.skip("the interleaved schedule needs as many microbatches as stages")
    student_layer = layout.flags.get("--let-student-layer", 2)
    reference_changes = {**changes, "--let-student-layer": student_layer}
    reference, plain = runs.run(
        1, reference_changes, f"one-process-{averaging}-{changes.get('--micro-batch-size')}-k{student_layer}"
    )
    other, effects = runs.run(layout.world_size, {**changes, **layout.flags}, f"{layout.name}-{averaging}")
    assert plain == {Effects()}
    assert effects - {None} == {layout.effects}
    assert_same_run(reference, other)


def test_the_data_hold_microbatches_without_counted_tokens_and_with_differing_numbers(
    runs: References,
) -> None:
    """Without them a division by the number of positions, or by the wrong rank's count, would show nothing."""
    counts = runs.counted_tokens()  # a sample is a microbatch
    assert len(counts) == 5 * 8
    assert counts.count(0) >= 2
    iterations = [counts[first : first + 8] for first in range(0, 40, 8)]
    assert all(len(set(iteration)) >= 4 for iteration in iterations)
    # two data-parallel ranks take turns: each has microbatches of its own counts
    assert all(sum(iteration[0::2]) != sum(iteration[1::2]) for iteration in iterations)
