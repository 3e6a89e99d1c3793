"""What must not change anything, changes nothing: comparisons of bits, not of tolerances."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_let.let import Teacher
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    assert_bitwise,
    numbers,
    stored_tensors,
    train,
)
from megatron_let.training import alignment as alignment_module
from megatron_let.training.teachers import load_teacher
from megatron_let.training.trainer import Trainer

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-sp": {"--tensor-model-parallel-size": 2, "--sequence-parallel": None},
    "pp2": {"--pipeline-model-parallel-size": 2},
}
DROPOUT = {"--hidden-dropout": 0.1, "--attention-dropout": 0.1}


def test_weight_zero_is_the_plain_run_bit_for_bit(
    pool: RankPool, token_files: Path, teacher: Path, tmp_path: Path
) -> None:
    base = {"--data-path": token_files, **DROPOUT}
    let = {"--let-teacher-load": teacher, "--let-weight": 0.0, "--let-stop-iters": 4}
    for name, changes in {"plain": {}, "zero": let}.items():
        pool.run(2, train, arguments(TINY_STUDENT, {**base, **changes, "--save": tmp_path / name}))
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "zero")
    assert_bitwise(tmp_path / "plain", tmp_path / "zero", 5)
    assert all(row["let_cosine"] is None and row["let_weight"] is None for row in numbers(tmp_path / "zero"))


@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_that_runs_leaves_the_students_dropout_as_it_is(
    layout: str,
    kind: str,
    pool: RankPool,
    token_files: Path,
    teacher: Path,
    megatron_teacher: Path,
    tmp_path: Path,
) -> None:
    """The first iteration's loss, over eight microbatches, comes before LET has changed a weight."""
    base = {"--data-path": token_files, "--train-iters": 1, **DROPOUT, **LAYOUTS[layout]}
    path = teacher if kind == "hf" else megatron_teacher
    let = {"--let-teacher-load": path, "--let-weight": 1.0, "--let-stop-iters": 1}
    plain, guided = {**base, "--save": tmp_path / "plain"}, {**base, **let, "--save": tmp_path / "let"}
    pool.run(2, train, arguments(TINY_STUDENT, plain))
    pool.run(2, train_with_a_teacher_that_draws, arguments(TINY_STUDENT, guided))
    (expected,), (actual,) = numbers(tmp_path / "plain"), numbers(tmp_path / "let")
    assert actual["let_cosine"] is not None
    assert actual["lm_loss"] == expected["lm_loss"]
    assert actual["grad_norm"] != expected["grad_norm"]


def train_with_a_teacher_that_draws(argv: list[str]) -> int:
    """Train on this rank; building the teacher draws random numbers, as random initial weights would."""

    def load(*args: Any) -> Teacher:
        torch.rand(7)
        return load_teacher(*args)

    with patch.object(alignment_module, "load_teacher", load):
        return train(argv)


def test_after_stop_the_run_is_what_a_run_without_teacher_makes_of_that_state(
    pool: RankPool, token_files: Path, teacher: Path, tmp_path: Path
) -> None:
    base = {"--data-path": token_files, **DROPOUT, **LAYOUTS["tp2-sp"]}
    let = {"--let-teacher-load": teacher, "--let-weight": 1.0, "--let-stop-iters": 2}
    whole = {**base, **let, "--save": tmp_path / "let", "--save-interval": 2}
    pool.run(2, train, arguments(TINY_STUDENT, whole))
    plain = {**base, "--load": tmp_path / "let", "--ckpt-step": 2, "--let-override": None}
    pool.run(2, train, arguments(TINY_STUDENT, {**plain, "--save": tmp_path / "plain"}))
    assert numbers(tmp_path / "let")[2:] == numbers(tmp_path / "plain")
    assert_bitwise(tmp_path / "let", tmp_path / "plain", 5)


def train_and_hash_teacher(argv: list[str]) -> tuple[str, str, int]:
    """Train and return the teacher's weights hashed before and after, and how many of them have a gradient."""
    import os

    from megatron_let.config.derive import resolve
    from megatron_let.mcore.parallel import parallel_context
    from megatron_let.training.arguments import parse_arguments
    from megatron_let.training.build import build_trainer
    from megatron_let.training.signals import StopRequest

    config = resolve(parse_arguments(argv), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        alignment = trainer.run.alignment
        assert alignment is not None
        assert alignment.teacher is not None
        parameters = list(alignment.teacher.parameters())
        before = _hash(parameters)
        trainer.fit()
        touched = sum(1 for p in parameters if p.grad is not None or p.requires_grad)
        return before, _hash(parameters), touched


def _hash(parameters: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_the_teacher_never_changes_and_gets_no_gradient(
    kind: str, pool: RankPool, token_files: Path, teacher: Path, start: Path
) -> None:
    changes = {
        "--data-path": token_files,
        "--let-teacher-load": teacher if kind == "hf" else start,
        "--let-weight": 1.0,
        "--let-stop-iters": 5,
    }
    before, after, touched = pool.run(1, train_and_hash_teacher, arguments(TINY_STUDENT, changes))[0]
    assert before == after
    assert touched == 0


def test_teacher_weights_are_not_in_the_checkpoint(
    pool: RankPool, token_files: Path, teacher: Path, tmp_path: Path
) -> None:
    base = {"--data-path": token_files}
    let = {"--let-teacher-load": teacher, "--let-stop-iters": 5}
    for name, changes in {"plain": {}, "let": let}.items():
        pool.run(1, train, arguments(TINY_STUDENT, {**base, **changes, "--save": tmp_path / name}))
    plain, guided = (stored_tensors(tmp_path / name / "iter_0000005") for name in ("plain", "let"))
    assert plain.keys() == guided.keys()
    assert {name: tensor.shape for name, tensor in plain.items()} == {
        name: tensor.shape for name, tensor in guided.items()
    }


def train_watching_determinism(argv: list[str]) -> bool:
    """Train and return whether torch was held to deterministic algorithms meanwhile."""
    seen: list[bool] = []
    step = Trainer.step

    def watched(trainer: Trainer, iterators: list[Any]) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        step(trainer, iterators)

    with patch.object(Trainer, "step", watched):
        train(argv)
    assert not torch.are_deterministic_algorithms_enabled(), "put back"
    return all(seen) and bool(seen)


def test_deterministic_mode_holds_torch_to_it_and_changes_no_number(
    pool: RankPool, token_files: Path, tmp_path: Path
) -> None:
    base = {"--data-path": token_files, "--hidden-dropout": 0.1}
    for name, changes in {"plain": {}, "deterministic": {"--deterministic-mode": None}}.items():
        words = arguments(TINY_STUDENT, {**base, **changes, "--save": tmp_path / name})
        assert pool.run(1, train_watching_determinism, words) == [name == "deterministic"]
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "deterministic")
