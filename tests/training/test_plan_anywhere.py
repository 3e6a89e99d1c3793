"""A plan is the same wherever it is made, and leaves nothing behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from megatron_let.mcore import transformer_config
from megatron_let.mcore.stock_kernels import WeightGradients
from megatron_let.planning.plan import RunPlan
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.plan import PlanSettings, make_plan


def plan_of(changes: dict[str, Any]) -> RunPlan:
    flags = {"--mock-data": None, "--bf16": None, **changes}
    return make_plan(parse_arguments(arguments(TINY_STUDENT, flags)), PlanSettings(1))


@pytest.mark.parametrize("changes", [{}, {"--distributed-backend": "gloo"}], ids=["gpu", "gloo"])
def test_a_container_with_gpu_kernels_plans_the_same(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = plan_of(changes)
    monkeypatch.setattr(transformer_config, "has_fused_weight_gradient", lambda: True)
    monkeypatch.setattr(transformer_config, "has_transformer_engine", lambda: True)
    assert plan_of(changes) == here


def test_on_cpu_weight_gradients_are_added_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    add = WeightGradients.wgrad_gemm_accum_fp32
    monkeypatch.setattr(
        WeightGradients, "wgrad_gemm_accum_fp32", lambda *given: (added.append(1), add(*given))
    )
    plan_of({})
    assert not added
    plan_of({"--distributed-backend": "gloo"})
    assert len(added) >= 4 * 4 + 1  # of each layer four matrices, and the output layer's


def test_random_states_are_as_they_were() -> None:
    random.random(), np.random.random(), torch.rand(1)  # on from where a plan would set them
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    plan_of({})
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == str(before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
