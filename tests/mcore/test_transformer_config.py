"""From our settings to megatron-core's: what depends on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron_let.config.batches import layers_of_chunks
from megatron_let.config.derive import resolve
from megatron_let.mcore import transformer_config as module
from megatron_let.mcore.transformer_config import build_transformer_config
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments


def test_no_activation_needs_a_compiler_on_cpu() -> None:
    for flag in ("--swiglu", "--squared-relu", None):
        changes: dict[str, Any] = {"--mock-data": None, "--swiglu": False}
        if flag is not None:
            changes[flag] = None
        config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)
        activation = build_transformer_config(config, is_on_gpu=False).activation_func
        assert not hasattr(activation, "_torchdynamo_orig_callable"), flag  # what torch.compile leaves


def test_squared_relu_is_the_square_of_the_positive_part() -> None:
    changes = {"--mock-data": None, "--swiglu": False, "--squared-relu": None}
    config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)
    activation = build_transformer_config(config, is_on_gpu=False).activation_func
    assert activation(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0.0, 0.0, 9.0]


@pytest.mark.parametrize(
    ("is_there", "is_on_gpu", "expected"), [(True, True, True), (False, True, False), (False, False, True)]
)
def test_weight_gradients_are_fused_where_the_kernel_is(
    is_there: bool, is_on_gpu: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is apex's, also with Transformer Engine: the LM head is megatron-core's own layer. On CPU ours."""
    monkeypatch.setattr(module, "has_fused_weight_gradient", lambda: is_there)
    monkeypatch.setattr(module, "has_transformer_engine", lambda: is_on_gpu)
    config = resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None})), 1)
    fusions = module.available_fusions(config, is_on_gpu=is_on_gpu)
    assert fusions["gradient_accumulation_fusion"] is expected


@pytest.mark.parametrize("is_on_gpu", [True, False], ids=["gpu", "cpu"])
@pytest.mark.parametrize("chunks", [None, 2])
def test_outputs_of_virtual_stages_outlive_their_overlapped_sends(
    chunks: int | None, is_on_gpu: bool
) -> None:
    """megatron-core 0.16 frees an output without waiting for its send, which may still read it on any device."""
    changes: dict[str, Any] = {"--mock-data": None, "--pipeline-model-parallel-size": 2, "--num-layers": 4}
    if chunks is not None:
        changes["--num-virtual-stages-per-pipeline-rank"] = chunks
    config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 2)
    core = build_transformer_config(config, is_on_gpu=is_on_gpu)
    assert core.overlap_p2p_comm is (chunks is not None)
    assert core.deallocate_pipeline_outputs is not core.overlap_p2p_comm


@pytest.mark.parametrize(
    "changes",
    [
        {"--pipeline-model-parallel-size": 1},
        {},
        {"--num-virtual-stages-per-pipeline-rank": 2},
        {"--num-layers-per-virtual-pipeline-stage": 2},
        {"--decoder-first-pipeline-num-layers": 3, "--num-layers": 9},
        {"--decoder-first-pipeline-num-layers": 2, "--decoder-last-pipeline-num-layers": 6},
        {"--decoder-last-pipeline-num-layers": 4, "--num-virtual-stages-per-pipeline-rank": 2},
        {"--account-for-embedding-in-pipeline-split": None, "--num-layers": 11},
        {
            **{
                "--account-for-embedding-in-pipeline-split": None,
                "--account-for-loss-in-pipeline-split": None,
            },
            **{"--num-virtual-stages-per-pipeline-rank": 3, "--num-layers": 22},
        },
    ],
)
def test_chunks_have_the_layers_that_megatron_core_builds(changes: dict[str, Any]) -> None:
    base = {"--mock-data": None, "--num-layers": 16, "--pipeline-model-parallel-size": 4}
    words = arguments(TINY_STUDENT, {**base, "--global-batch-size": 12, **changes})
    config = parse_arguments(words)
    stages = config.transformer.pipeline_model_parallel_size
    core = build_transformer_config(resolve(config, stages), is_on_gpu=False)
    chunks = core.virtual_pipeline_model_parallel_size
    expected = [
        get_num_layers_to_build(core, chunk, stage)
        for chunk in ([None] if chunks is None else range(chunks))
        for stage in range(stages)
    ]
    assert layers_of_chunks(config) == expected
    assert sum(expected) == config.transformer.num_layers
