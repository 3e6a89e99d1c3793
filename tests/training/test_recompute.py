"""What is recomputed has the gradients of what is kept, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.one_iteration import run_one_iteration
from megatron_let.testing.training import TINY_STUDENT, arguments

TP2_SP = {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}
GPT2 = {
    **{
        "--swiglu": False,
        "--normalization": "LayerNorm",
        "--disable-bias-linear": False,
        "--qk-layernorm": None,
    },
    **{"--hidden-dropout": 0.1, "--attention-dropout": 0.1, "--bf16": None},
}


@pytest.mark.parametrize(
    ("world_size", "student", "modules"),
    [
        (1, {}, ["layernorm"]),
        (1, GPT2, ["core_attn", "layernorm", "mlp"]),
        (2, TP2_SP, ["layernorm", "mlp"]),
    ],
    ids=["norms", "gpt2-bf16-all", "sequence-parallel"],
)
def test_selective_recompute_of_every_part(
    world_size: int, student: dict[str, Any], modules: list[str], pool: RankPool
) -> None:
    base = {**student, "--mock-data": None, "--train-iters": False}
    selective = {"--recompute-granularity": "selective", "--recompute-modules": modules}
    kept, recomputed = (
        pool.run(world_size, run_one_iteration, arguments(TINY_STUDENT, {**base, **changes}))[0]
        for changes in ({}, selective)
    )
    assert recomputed.row is not None
    assert kept.row is not None
    assert recomputed.row.lm_loss == kept.row.lm_loss
    assert recomputed.gradients.keys() == kept.gradients.keys()
    for name, gradient in kept.gradients.items():
        assert gradient.any(), name
        assert torch.equal(recomputed.gradients[name], gradient), name
