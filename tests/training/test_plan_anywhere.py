"""A plan is the same wherever it is made, and leaves nothing behind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from megatron_let.mcore import transformer_config
from megatron_let.mcore.stock_kernels import WeightGradients
from tests.training.planned import MOCK, plan_of

FLAGS = {**MOCK, "--bf16": None}


@pytest.mark.parametrize("changes", [{}, {"--distributed-backend": "gloo"}], ids=["gpu", "gloo"])
def test_a_container_with_gpu_kernels_plans_the_same(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = plan_of({**FLAGS, **changes})
    monkeypatch.setattr(transformer_config, "has_fused_weight_gradient", lambda: True)
    monkeypatch.setattr(transformer_config, "has_transformer_engine", lambda: True)
    assert plan_of({**FLAGS, **changes}) == here


def test_on_cpu_weight_gradients_are_added_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    added = []
    add = WeightGradients.wgrad_gemm_accum_fp32

    def see(*given: torch.Tensor) -> None:
        added.append(given)
        add(*given)

    monkeypatch.setattr(WeightGradients, "wgrad_gemm_accum_fp32", see)
    plan_of(FLAGS)
    assert not added
    plan_of({**FLAGS, "--distributed-backend": "gloo"})
    assert len(added) >= 4 * 4 + 1  # of each layer four matrices, and the output layer's


def test_random_states_are_as_they_were() -> None:
    random.random(), np.random.random(), torch.rand(1)  # on from where a plan would set them
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    plan_of(FLAGS)
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == str(before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
