"""Evaluation knows nothing of LET: no teacher runs, the loss is the plain one, training goes on as if it had not been."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_let.config.derive import resolve
from megatron_let.mcore.parallel import parallel_context
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, metrics_rows, numbers, train
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.signals import StopRequest

STOP, TOTAL, NUM_MICROBATCHES = 3, 4, 8
EVALUATED = {"--eval-interval": 1, "--eval-iters": 2}


def train_and_count_teacher(argv: list[str]) -> int:
    """Train on this rank; return how often its teacher read tokens."""
    config = resolve(parse_arguments(argv), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        alignment = trainer.run.alignment
        assert alignment is not None
        if alignment.teacher is None:
            trainer.fit()
            return 0
        kind = type(alignment.teacher)
        with patch.object(kind, "states", autospec=True, side_effect=kind.states) as states:
            trainer.fit()
        return states.call_count


def validation_losses(directory: Path) -> dict[int, float]:
    """Return the validation loss at each evaluated iteration."""
    rows = metrics_rows(directory)
    return {row["iteration"]: row["validation_lm_loss"] for row in rows if "validation_lm_loss" in row}


@pytest.fixture
def base(token_files: Path, teacher: Path) -> dict[str, Any]:
    """Return LET settings with S_stop before the end and dropout, which evaluation must not draw from."""
    return {
        "--data-path": token_files,
        "--split": "70,30,0",
        "--train-iters": TOTAL,
        "--hidden-dropout": 0.1,
        "--let-teacher-load": teacher,
        "--let-weight": 1.0,
        "--let-stop-iters": STOP,
        "--let-student-layer": 2,
    }


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_teacher_reads_each_microbatch_of_an_active_iteration_once_and_nothing_else(
    num_stages: int, base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    base = {**base, "--pipeline-model-parallel-size": num_stages}
    evaluated = arguments(TINY_STUDENT, {**base, **EVALUATED, "--save": tmp_path / "evaluated"})
    calls = pool.run(num_stages, train_and_count_teacher, evaluated)
    assert calls == [STOP * NUM_MICROBATCHES, 0][:num_stages]
    assert list(validation_losses(tmp_path / "evaluated")) == [1, 2, 3, 4]
    pool.run(num_stages, train, arguments(TINY_STUDENT, {**base, "--save": tmp_path / "not"}))
    assert numbers(tmp_path / "evaluated") == numbers(tmp_path / "not")


def test_the_validation_loss_is_that_of_a_plain_run_with_the_same_weights(
    base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    """Bitwise: at iteration 2 the teacher is there and its hook is on layer k, in the plain run they never were."""
    save = {"--save": tmp_path / "let", "--save-interval": 2}
    pool.run(1, train, arguments(TINY_STUDENT, {**base, **EVALUATED, **save}))
    gone = {flag: False for flag in base if flag.startswith("--let")}
    load = {"--load": tmp_path / "let", "--ckpt-step": 2, "--skip-train": None, "--let-override": None}
    plain = {**base, **gone, **EVALUATED, **load, "--save": tmp_path / "plain"}
    pool.run(1, train, arguments(TINY_STUDENT, plain))
    expected = validation_losses(tmp_path / "plain")
    assert list(expected) == [2]
    assert validation_losses(tmp_path / "let")[2] == expected[2]
    assert expected[2] not in [validation_losses(tmp_path / "let")[i] for i in (1, 3, 4)]
