"""One iteration of the program against Hugging Face models with the same weights: losses and every gradient.

Everything between is held: the fused QKV and gate/up layouts, biases, norms, rotary and learned positions, tied
embeddings, the padded vocabulary, loss masks, averaging over microbatches, the teacher's states, their interpolation
and the alignment's gradient, and on several ranks all reductions. The weights are spread by 0.1 so that no bias is 0
and no norm weight 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.testing.hf_students import STUDENTS, build_twin
from megatron_let.testing.tiny_teachers import FAMILIES, write_tiny_teacher
from tests.training.our_side import (
    LAYOUTS,
    MICRO_BATCH,
    VOCABULARY,
    Ours,
    assert_equals_reference,
    problem_of,
)
from tests.training.plain_reference import compute, hf_teacher, states_of

CASES = [
    *((family, "one-process", weight) for family in STUDENTS for weight in (0.0, 0.1, 1.0)),
    *(
        (family, layout, 1.0)
        for family in STUDENTS
        for layout in LAYOUTS
        if layout not in ("one-process", "tp4")
    ),
    ("gpt2", "tp4", 1.0),
]


@pytest.mark.parametrize(("family", "layout", "weight"), CASES)
def test_losses_and_gradients_are_those_of_hugging_face(
    family: str, layout: str, weight: float, ours: Ours, teacher: Path
) -> None:
    student = STUDENTS[family]
    iteration = ours.run(student, layout, teacher, {"--let-weight": weight})
    twin = build_twin(student, iteration.weights, vocab_size=VOCABULARY)
    problem = problem_of(iteration, weight=weight)
    assert [int(m.sum()) for m in problem.mask.split(MICRO_BATCH)] == [37, 61], "the masks must differ"
    assert (iteration.row is not None and iteration.row.let_loss is None) == (weight == 0.0)
    assert_equals_reference(iteration, twin, compute(problem, twin, hf_teacher(teacher)))


@pytest.mark.parametrize(
    ("family", "layout"), [*(("llama", layout) for layout in LAYOUTS if layout != "tp4"), ("gpt2", "tp4")]
)
def test_per_token_averaging_divides_by_all_tokens_of_the_iteration(
    family: str, layout: str, ours: Ours, teacher: Path
) -> None:
    changes = {"--let-weight": 0.1, "--calculate-per-token-loss": None}
    iteration = ours.run(STUDENTS[family], layout, teacher, changes)
    twin = build_twin(STUDENTS[family], iteration.weights, vocab_size=VOCABULARY)
    problem = problem_of(iteration, weight=0.1, is_per_token=True)
    assert_equals_reference(iteration, twin, compute(problem, twin, hf_teacher(teacher)))


@pytest.mark.parametrize("is_per_token", [False, True])
def test_a_microbatch_without_counted_tokens_adds_nothing(
    is_per_token: bool, ours: Ours, teacher: Path
) -> None:
    changes: dict[str, Any] = {"--micro-batch-size": 1, "--global-batch-size": 16}
    if is_per_token:
        changes["--calculate-per-token-loss"] = None
    student = STUDENTS["llama"]
    iteration = ours.run(student, "one-process", teacher, changes)
    problem = problem_of(iteration, micro_batch_size=1, is_per_token=is_per_token)
    assert 0 in problem.mask.sum(1), "the data must hold such a sample"
    twin = build_twin(student, iteration.weights, vocab_size=VOCABULARY)
    assert_equals_reference(iteration, twin, compute(problem, twin, hf_teacher(teacher)))


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_hugging_face_teachers_and_layers(
    family: str, layer: int | None, ours: Ours, tmp_path: Path
) -> None:
    write_tiny_teacher(family, tmp_path)
    student = STUDENTS["llama"]
    iteration = ours.run(student, "one-process", tmp_path, {"--let-teacher-layer": layer or False})
    twin = build_twin(student, iteration.weights, vocab_size=VOCABULARY)
    states = hf_teacher(tmp_path, layer)
    assert_equals_reference(iteration, twin, compute(problem_of(iteration), twin, states))


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "neox"])
def test_a_megatron_checkpoint_as_teacher(family: str, layer: int | None, ours: Ours, teacher: Path) -> None:
    as_student = ours.run(STUDENTS[family], "one-process", teacher)  # for its weights
    teacher_twin = build_twin(STUDENTS[family], as_student.weights, vocab_size=VOCABULARY)
    student = STUDENTS["llama"]
    changes = {"--let-teacher-layer": layer or False}
    iteration = ours.run(student, "one-process", ours.start(STUDENTS[family]), changes)
    twin = build_twin(student, iteration.weights, vocab_size=VOCABULARY)
    states = states_of(teacher_twin.model, layer)
    assert_equals_reference(iteration, twin, compute(problem_of(iteration), twin, states))


@pytest.mark.parametrize(("layout", "rows"), [("one-process", 72), ("tp2", 96)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_pad_the_vocabulary_get_no_gradient(
    family: str, layout: str, rows: int, ours: Ours, teacher: Path
) -> None:
    iteration = ours.run(STUDENTS[family], layout, teacher)
    names = ["embedding.word_embeddings.weight"] + ["output_layer.weight"] * (family == "llama")
    for name in names:
        assert iteration.weights[name].shape[0] == rows  # 61 ids, a multiple of 24 x TP
        assert iteration.weights[name][VOCABULARY:72].abs().min() > 0  # they would have logits
        assert not iteration.gradients[name][VOCABULARY:].any()
        assert iteration.gradients[name][:VOCABULARY].any(dim=1).sum() > 40


@pytest.mark.parametrize(("layout", "rows"), [("one-process", 72), ("tp2", 96)])
def test_unmasked_padding_is_a_larger_vocabulary_as_in_megatron(
    layout: str, rows: int, ours: Ours, teacher: Path
) -> None:
    iteration = ours.run(STUDENTS["llama"], layout, teacher, {"--no-mask-padded-logits": None})
    twin = build_twin(STUDENTS["llama"], iteration.weights, vocab_size=rows)
    expected = compute(problem_of(iteration), twin, hf_teacher(teacher))
    assert_equals_reference(iteration, twin, expected)
    masked = ours.run(STUDENTS["llama"], layout, teacher).row
    assert masked is not None
    assert expected.lm_loss > masked.lm_loss + 0.1


def test_every_layout_starts_from_the_same_weights(ours: Ours, teacher: Path) -> None:
    expected = ours.run(STUDENTS["gpt2"], "one-process", teacher).weights
    for layout in LAYOUTS:
        weights = ours.run(STUDENTS["gpt2"], layout, teacher).weights
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            rows = VOCABULARY if "word_embeddings" in name else tensor.shape[0]
            assert torch.equal(weights[name][:rows], tensor[:rows]), (layout, name)
