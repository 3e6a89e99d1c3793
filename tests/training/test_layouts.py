"""LET on every parallel layout against the same run on one process: losses, cosines, gradient norms, final weights.

fp32 on CPU. Sums are added up in another order on another layout, so the comparison is to 1e-5 relative (some hundred
roundings of 6e-8) for losses and norms, and to 2e-5 absolute for weights after five Adam steps at 3e-3: Adam divides
by the root of the second moment, which amplifies roundings of near-zero gradients, yet a wrong gradient moves weights
by whole steps (1e-3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    largest_difference,
    model_tensors,
    train,
    training_rows,
)

RELATIVE = 1e-5
WEIGHTS = 2e-5
COMPARED = ("lm_loss", "let_loss", "let_cosine", "let_cosine_centered", "grad_norm", "let_weight")


@dataclass(frozen=True)
class Layout:
    """A layout and how it is asked for."""

    name: str
    world_size: int
    flags: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


TP2 = {"--tensor-model-parallel-size": 2}
PP2 = {"--pipeline-model-parallel-size": 2}
VPP = {**PP2, "--num-layers-per-virtual-pipeline-stage": 1}
FULL = {"--recompute-granularity": "full"}

LAYOUTS = [
    Layout("tp2", 2, TP2),
    Layout("tp2-sp", 2, {**TP2, "--sequence-parallel": None}),
    Layout("pp2-k-first", 2, {**PP2, "--let-student-layer": 2}),
    Layout("pp2-k-last", 2, {**PP2, "--let-student-layer": 4}),
    Layout("pp4", 4, {"--pipeline-model-parallel-size": 4, "--let-student-layer": 3}),
    *(Layout(f"pp2-vp2-k{k}", 2, {**VPP, "--let-student-layer": k}) for k in (1, 2, 3, 4)),
    Layout("dp2", 2),
    Layout("dp2-distributed-optimizer", 2, {"--use-distributed-optimizer": None}),
    Layout(
        "dp2-overlap",
        2,
        {
            "--use-distributed-optimizer": None,
            "--overlap-grad-reduce": None,
            "--overlap-param-gather": None,
            "--ddp-bucket-size": 20000,
        },
    ),
    Layout("tp2-pp2-sp", 4, {**TP2, **PP2, "--sequence-parallel": None, "--let-student-layer": 3}),
    Layout("tp2-dp2", 4, TP2),
    Layout("selective-recompute", 1, {"--recompute-granularity": "selective"}),
    Layout("full-uniform", 1, {**FULL, "--recompute-method": "uniform", "--recompute-num-layers": 2}),
    Layout("full-block", 1, {**FULL, "--recompute-method": "block", "--recompute-num-layers": 2}),
    Layout(
        "pp2-full-uniform",
        2,
        {
            **PP2,
            **FULL,
            "--recompute-method": "uniform",
            "--recompute-num-layers": 1,
            "--let-student-layer": 3,
        },
    ),
    Layout(
        "pp2-vp2-full-block",
        2,
        {**VPP, **FULL, "--recompute-method": "block", "--recompute-num-layers": 1, "--let-student-layer": 3},
    ),
]
AVERAGING: dict[str, dict[str, Any]] = {
    "mean-of-microbatches": {},
    "per-token": {"--calculate-per-token-loss": None},
    "one-microbatch": {"--micro-batch-size": 8},
}


class References:
    """The one-process runs that layouts are held against, each made once."""

    def __init__(self, pool: RankPool, base: dict[str, Any], root: Path) -> None:
        self._pool, self._base, self._root = pool, base, root

    def run(self, world_size: int, changes: dict[str, Any], name: str) -> Path:
        """Train and return the save directory; a run that exists already is reused."""
        directory = self._root / name
        if not directory.exists():
            words = arguments(TINY_STUDENT, {**self._base, **changes, "--save": directory})
            self._pool.run(world_size, train, words)
        return directory


@pytest.fixture(scope="session")
def runs(
    pool: RankPool, token_files: Path, teacher: Path, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> References:
    """Return the maker of runs: LET from one start checkpoint, five iterations, differing loss masks."""
    base = {
        "--data-path": token_files,
        "--eod-mask-loss": None,
        "--load": start,
        "--finetune": None,
        "--let-teacher-load": teacher,
        "--let-student-layer": 2,
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
    reference = runs.run(
        1, reference_changes, f"one-process-{averaging}-{changes.get('--micro-batch-size')}-k{student_layer}"
    )
    other = runs.run(layout.world_size, {**changes, **layout.flags}, f"{layout.name}-{averaging}")
    assert_same_run(reference, other)
