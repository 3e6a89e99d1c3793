"""--log-params-norm against the weights of the checkpoint, timers, and the time that a ramp-up leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, stored_tensors, train, training_rows
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.bad_numbers import StepOutcome
from megatron_let.training.report import IntervalTotals, Reporter
from megatron_let.training.state import TrainingState

TIED = {
    **{"--swiglu": False, "--normalization": "LayerNorm", "--disable-bias-linear": False},
    **{"--position-embedding-type": "learned_absolute", "--untie-embeddings-and-output-weights": False},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {**TIED, "--tensor-model-parallel-size": 2},
    "pipeline": {**TIED, "--pipeline-model-parallel-size": 2},
    "distributed optimizer": {
        **{"--bf16": None, "--use-distributed-optimizer": None},
        **{"--overlap-grad-reduce": None, "--overlap-param-gather": None},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_counts_once(layout: str, pool: RankPool, tmp_path: Path) -> None:
    run = {"--mock-data": None, "--train-iters": 2, "--save": tmp_path, "--log-params-norm": None}
    pool.run(2, train, arguments(TINY_STUDENT, {**run, **LAYOUTS[layout]}))
    stored = stored_tensors(tmp_path / "iter_0000002")
    main = [weight for name, weight in stored.items() if name.startswith("optimizer.state.param.")]
    held = [weight for name, weight in stored.items() if not name.startswith("optimizer.")]
    assert bool(main) == ("--bf16" in LAYOUTS[layout])
    expected = torch.stack([weight.double().norm() for weight in main or held]).norm()
    # fp32 sums of 0.1M squares
    assert training_rows(tmp_path)[-1]["params_norm"] == pytest.approx(float(expected), rel=1e-6)


def test_timers_are_phases_of_the_iteration_where_they_are_asked_for(pool: RankPool, tmp_path: Path) -> None:
    run = {"--mock-data": None, "--train-iters": 2, "--save": tmp_path}
    pool.run(1, train, arguments(TINY_STUDENT, {**run, "--log-timers-to-tensorboard": None}))
    row = training_rows(tmp_path)[-1]
    assert row["optimizer_ms"] > 0
    assert row["forward_backward_ms"] > 0
    assert row["forward_backward_ms"] + row["optimizer_ms"] < row["iteration_ms"]
    pool.run(1, train, arguments(TINY_STUDENT, {**run, "--save": tmp_path / "without"}))
    row = training_rows(tmp_path / "without")[-1]
    assert row["optimizer_ms"] is None
    assert row["forward_backward_ms"] is None


def test_the_time_left_counts_what_a_ramp_up_still_adds(logged: pytest.LogCaptureFixture) -> None:
    logged.set_level("INFO")
    config = parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None}))
    context = cast(Any, SimpleNamespace(rank=0, world_size=1, is_on_gpu=False))
    totals = IntervalTotals(torch.device("cpu"))
    totals.add([], StepOutcome(is_updated=True, grad_norm=1.0, num_zeros=None, is_bad=False), 2, 0.5)
    Reporter(config, context, (), 1.0, None).training(
        TrainingState(iteration=1, consumed_samples=2),
        totals,
        lm_loss=1.0,
        let_report=None,
        let_weight=None,
        learning_rate=1.0,
        loss_scale=1.0,
        total_iterations=2,
        samples_left=64,
        params_norm=None,
    )
    assert "ETA: 0:00:16 |" in logged.text  # 64 samples at a quarter of a second
