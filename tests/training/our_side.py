"""Our side of the comparisons with plain_reference.py: the program's first iteration on a layout, from known weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.hf_students import StudentFamily, Twin
from megatron_let.testing.one_iteration import OneIteration, run_one_iteration, write_spread_checkpoint
from megatron_let.testing.training import TINY_STUDENT, arguments
from tests.training.plain_reference import Expected, Problem

VOCABULARY, STUDENT_LAYER, MICRO_BATCH = 61, 2, 2
EOD = 60
"""The NullTokenizer's end of document for --vocab-size 60."""

# fp32: two implementations of a 4-layer model differ by a few hundred roundings of 6e-8.
LOSS = 1e-5
# Relative to the largest entry of each gradient tensor: entries that cancel to nothing keep the roundings of what
# cancelled. A wrong layout, scale or mask is off by 1e-1.
GRADIENT = 2e-5

TP2 = {"--tensor-model-parallel-size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-process": (1, {}),
    "tp2": (2, TP2),
    "tp2-sp": (2, {**TP2, "--sequence-parallel": None}),
    "tp4": (4, {"--tensor-model-parallel-size": 4}),  # the last rank's vocabulary is padding alone
    "pp2": (2, {"--pipeline-model-parallel-size": 2}),
    "pp4": (4, {"--pipeline-model-parallel-size": 4}),
    "pp2-vp2": (2, {"--pipeline-model-parallel-size": 2, "--num-layers-per-virtual-pipeline-stage": 1}),
    "dp2": (2, {}),
    "tp2-pp2-sp": (4, {**TP2, "--pipeline-model-parallel-size": 2, "--sequence-parallel": None}),
}


@dataclass(frozen=True)
class Ours:
    """Runs the program's first iteration from a spread checkpoint of a student family."""

    pool: RankPool
    data: Path
    root: Path
    done: dict[tuple[str, ...], OneIteration] = field(default_factory=dict)

    def base(self, family: StudentFamily) -> dict[str, Any]:
        """Return the flags of a student that reads microbatches of two samples."""
        return {
            **TINY_STUDENT,
            **family.flags,
            "--train-iters": False,
            "--data-path": self.data,
            "--micro-batch-size": MICRO_BATCH,
            "--global-batch-size": 2 * MICRO_BATCH,
        }

    def start(self, family: StudentFamily) -> Path:
        """Return a checkpoint of the family, written once."""
        directory = self.root / family.name
        if not directory.exists():
            self.pool.run(1, write_spread_checkpoint, arguments(self.base(family)), directory)
        return directory

    def run(
        self, family: StudentFamily, layout: str, teacher: Path, changes: dict[str, Any] | None = None
    ) -> OneIteration:
        """Run one iteration of LET on a layout; rank 0's view of it."""
        world_size, flags = LAYOUTS[layout]
        let = {
            "--load": self.start(family),
            "--finetune": None,
            "--eod-mask-loss": None,
            "--let-teacher-load": teacher,
            "--let-weight": 1.0,
            "--let-stop-iters": 1,
            "--let-student-layer": STUDENT_LAYER,
        }
        words = arguments(self.base(family), {**let, **flags, **(changes or {})})
        key = (layout, *words)
        if key not in self.done:
            self.done[key] = self.pool.run(world_size, run_one_iteration, words)[0]
        return self.done[key]


def problem_of(iteration: OneIteration, **changes: Any) -> Problem:
    """Return the reference's view of an iteration with --eod-mask-loss."""
    mask = (iteration.tokens != EOD).float()
    settings: dict[str, Any] = {
        "micro_batch_size": MICRO_BATCH,
        "weight": 1.0,
        "student_layer": STUDENT_LAYER,
        **changes,
    }
    return Problem(iteration.tokens, iteration.labels, mask, **settings)


def assert_equals_reference(iteration: OneIteration, twin: Twin, expected: Expected) -> None:
    """Assert that losses and the gradient of every parameter are the reference's."""
    row = iteration.row
    assert row is not None
    assert row.lm_loss == pytest.approx(expected.lm_loss, rel=LOSS)
    if row.let_loss is not None:
        assert row.let_loss == pytest.approx(expected.let_loss, rel=LOSS, abs=LOSS)
        assert row.let_cosine == pytest.approx(-expected.let_loss, rel=LOSS, abs=LOSS)
    actual = twin.to_hf(iteration.gradients)
    assert actual.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 1e-4, f"the test shows nothing of {name}"
        error = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert error <= GRADIENT, f"{name}: {error:.1e}"
