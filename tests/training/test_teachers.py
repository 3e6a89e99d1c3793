"""The number type a teacher computes in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.config.derive import resolve
from megatron_let.mcore.parallel import parallel_context
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.signals import StopRequest
from megatron_let.training.teachers import teacher_dtype

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STUDENTS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"--bf16": None}, "fp16": {"--fp16": None}}


def words(teacher: Path, **changes: Any) -> list[str]:
    """Return the words of a run with a teacher; `changes` by flag names with underscores."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return arguments(TINY_STUDENT, {"--mock-data": None, "--let-teacher-load": teacher, **flags})


@pytest.mark.parametrize("student", STUDENTS)
def test_by_default_it_is_the_students_compute_type(student: str, teacher: Path) -> None:
    for choice in ({}, {"--let-teacher-dtype": "auto"}):
        argv = arguments({}, {**STUDENTS[student], **choice})
        assert teacher_dtype(resolve(parse_arguments([*words(teacher), *argv]), 1)) == NAMES[student]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("student", STUDENTS)
def test_a_named_type_stands_whatever_the_student_computes_in(student: str, name: str, teacher: Path) -> None:
    argv = [*words(teacher, let_teacher_dtype=name), *arguments({}, STUDENTS[student])]
    assert teacher_dtype(resolve(parse_arguments(argv), 1)) == NAMES[name]


def types_of_teacher(argv: list[str]) -> tuple[set[torch.dtype], torch.dtype]:
    """Build the run on this rank; return the types of the teacher's weights and of its states."""
    config = resolve(parse_arguments(argv), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        assert trainer.run.alignment is not None
        teacher = trainer.run.alignment.teacher
        assert teacher is not None
        states = teacher.states(torch.zeros(1, 4, dtype=torch.long))
        trainer.run.reporter.close()
        return {weight.dtype for weight in teacher.parameters()}, states.dtype


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_every_weight_and_the_states_have_the_type(
    kind: str, choice: str, expected: torch.dtype, pool: RankPool, teacher: Path, start: Path
) -> None:
    argv = words(teacher if kind == "hf" else start, bf16=None, let_teacher_dtype=choice)
    ((weights, states),) = pool.run(1, types_of_teacher, argv)
    assert weights == {expected}
    assert states == expected
