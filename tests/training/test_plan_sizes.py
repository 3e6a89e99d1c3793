"""Parameters, optimizer states and checkpoints of a plan against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.training.planned import MOCK, plan_of

# Queries and the output, keys and values of two groups of four heads, gate, up and down; two norms.
LAYER = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96 + 2 * 48
PARAMETERS = 4 * LAYER + 2 * 72 * 48 + 48
SGD = {"--optimizer": "sgd"}


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_tied_output_layer_counts_once(tensor: int) -> None:
    tied = {"--untie-embeddings-and-output-weights": False, "--vocab-size": 623}
    layout = {"--pipeline-model-parallel-size": 2, "--tensor-model-parallel-size": tensor}
    plan = plan_of({**MOCK, **tied, **layout}, 2 * tensor)
    embedding = 624 * 48  # a quarter of the whole
    half = 2 * LAYER
    assert [stage.whole_parameters for stage in plan.stages] == [half + embedding, half + 48]
    assert plan.parameters == 2 * half + embedding + 48
    norms = 2 * 2 * 48
    on_each = (half - norms + embedding) // tensor + norms
    assert [stage.parameters for stage in plan.stages] == [on_each, on_each + 48]


@pytest.mark.parametrize(
    ("changes", "held", "saved"),
    [
        ({}, 8, 12),  # two moments
        ({"--bf16": None}, 12, 14),  # main weights and two moments
        ({**SGD, "--sgd-momentum": 0.9}, 4, 8),
        ({**SGD, "--sgd-momentum": 0.0}, 0, 4),
        ({**SGD, "--sgd-momentum": 0.9, "--bf16": None}, 8, 10),
        ({"--bf16": None, "--no-save-optim": None, "--save": "nowhere"}, 12, 2),
        ({"--no-save-optim": None, "--save": "nowhere"}, 8, 4),
        ({"--use-distributed-optimizer": None}, 8, 16),  # main weights are saved beside fp32 ones
    ],
)
def test_bytes_a_parameter(changes: dict[str, Any], held: int, saved: int) -> None:
    plan = plan_of({**MOCK, **changes})
    assert plan.parameters == PARAMETERS
    assert plan.stages[0].memory.optimizer == held * PARAMETERS
    assert plan.checkpoint_bytes == saved * PARAMETERS
