"""Documents that do not see each other, and teachers that read less than a sequence, against runs piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.hf_students import STUDENTS, build_twin
from megatron_let.testing.one_iteration import write_spread_checkpoint
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.testing.training import arguments
from tests.training.our_side import EOD, VOCABULARY, Ours, assert_equals_reference, problem_of
from tests.training.plain_reference import compute, documents, hf_teacher, states_of

BY_DOCUMENT: dict[str, Any] = {"--reset-attention-mask": None, "--reset-position-ids": None}


@pytest.mark.parametrize("layout", ["one-process", "tp2-sp", "pp2", "pp4", "pp2-vp2"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_student_and_teacher_see_one_document_at_a_time_on_every_stage(
    family: str, layout: str, ours: Ours, teacher: Path
) -> None:
    """Every stage masks: with one that does not, the gradient of its layers and all below is another."""
    iteration = ours.run(STUDENTS[family], layout, teacher, BY_DOCUMENT)
    assert sum(len(list(documents(row, EOD))) for row in iteration.tokens) >= 8, (
        "the data must hold documents"
    )
    twin = build_twin(STUDENTS[family], iteration.weights, vocab_size=VOCABULARY)
    problem = problem_of(iteration, eod=EOD)
    assert_equals_reference(iteration, twin, compute(problem, twin, hf_teacher(teacher)))


def test_the_mask_alone_leaves_positions_as_they_are(ours: Ours, teacher: Path) -> None:
    """Rotary positions are relative, so for this student nothing else differs; the teacher starts anew anyway."""
    iteration = ours.run(STUDENTS["llama"], "one-process", teacher, {"--reset-attention-mask": None})
    twin = build_twin(STUDENTS["llama"], iteration.weights, vocab_size=VOCABULARY)
    problem = problem_of(iteration, eod=EOD)
    assert_equals_reference(iteration, twin, compute(problem, twin, hf_teacher(teacher)))


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("window", [8, 12])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_teacher_with_a_short_context_reads_window_by_window(
    family: str, window: int, by_document: bool, ours: Ours, tmp_path: Path
) -> None:
    """32 tokens are 4 windows of 8, or 12 + 12 + 8; a document starts a window of its own."""
    write_tiny_teacher(family, tmp_path, context=window)
    student = STUDENTS["llama"]
    changes = BY_DOCUMENT if by_document else {}
    iteration = ours.run(student, "one-process", tmp_path, changes)
    twin = build_twin(student, iteration.weights, vocab_size=VOCABULARY)
    problem = problem_of(iteration, eod=EOD if by_document else None)
    assert_equals_reference(iteration, twin, compute(problem, twin, hf_teacher(tmp_path, window=window)))


def test_a_megatron_teacher_reads_as_many_tokens_as_it_was_trained_on(
    ours: Ours, teacher: Path, pool: RankPool, tmp_path: Path
) -> None:
    family, student = STUDENTS["llama-tied"], STUDENTS["llama"]
    words = arguments(ours.base(family), {"--seq-length": 16})
    pool.run(1, write_spread_checkpoint, words, tmp_path)
    # its weights are those of the other checkpoint of this family: the same seeds, no learned positions
    as_student = ours.run(family, "one-process", teacher)
    teacher_twin = build_twin(family, as_student.weights, vocab_size=VOCABULARY)
    iteration = ours.run(student, "one-process", tmp_path)
    twin = build_twin(student, iteration.weights, vocab_size=VOCABULARY)
    expected = compute(problem_of(iteration), twin, states_of(teacher_twin.model, window=16))
    assert_equals_reference(iteration, twin, expected)
