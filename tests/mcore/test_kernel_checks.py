"""Kernels asked for by name: refused where the student's layers lack them, named where they change nothing."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_let import optional
from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore import transformer_config
from megatron_let.mcore.kernel_checks import check_kernels
from megatron_let.mcore.model import build_student
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.transformer_config import build_transformer_config
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, refusal
from megatron_let.training.arguments import parse_arguments

GELU = {"--swiglu": False, "--disable-bias-linear": False}
FP8 = {"--bf16": None, "--fp8-format": "hybrid"}
LOCAL = {"--transformer-impl": "local"}


@pytest.fixture(autouse=True)
def transformer_engine_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (optional, transformer_config):
        monkeypatch.setattr(module, "has_transformer_engine", lambda: True)


def settings(changes: dict[str, Any], world_size: int = 1) -> RunConfig:
    return resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None, **changes})), world_size)


REFUSED_ON_CPU: list[tuple[dict[str, Any], str]] = [
    (FP8, "--fp8-format hybrid needs Transformer Engine's layers, which are not used here: no GPU is visible"),
    ({"--context-parallel-size": 2}, "--context-parallel-size 2 needs Transformer Engine's layers"),
    ({"--attention-backend": "flash"}, "--attention-backend flash needs Transformer Engine's layers"),
    ({"--use-flash-attn": None}, "--attention-backend flash needs Transformer Engine's layers"),
    ({"--attention-backend": "fused"}, "--attention-backend fused needs Transformer Engine's layers"),
    ({"--bias-swiglu-fusion": None}, "--bias-swiglu-fusion: there is no such fused kernel on CPU"),
    ({**GELU, "--bias-gelu-fusion": None}, "--bias-gelu-fusion: there is no such fused kernel on CPU"),
    ({"--cross-entropy-loss-fusion": None}, "--cross-entropy-loss-fusion: there is no such fused kernel on CPU"),
    ({"--bias-dropout-fusion": None, "--rope-fusion": None}, "--bias-dropout-fusion, --rope-fusion: there is no such"),
    ({"--masked-softmax-fusion": None}, "--masked-softmax-fusion: there is no such fused kernel on CPU"),
]  # fmt: skip
REFUSED_ON_GPU: list[tuple[dict[str, Any], str]] = [
    ({"--persist-layer-norm": None, **LOCAL}, "--persist-layer-norm: there is no such fused kernel with these layers"),
    ({"--bf16": None, "--fp32-residual-connection": None}, "give --transformer-impl local"),
    ({"--attention-backend": "local"}, "give --transformer-impl local"),
    ({"--apply-query-key-layer-scaling": None}, "set NVTE_APPLY_QK_LAYER_SCALING=1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), REFUSED_ON_CPU)
def test_what_the_layers_on_cpu_lack_is_refused(changes: dict[str, Any], expected: str) -> None:
    config = settings(changes, world_size=changes.get("--context-parallel-size", 1))
    with pytest.raises(ConfigError) as caught:
        check_kernels(config, is_on_gpu=False)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "expected"), REFUSED_ON_GPU)
def test_what_the_layers_on_a_gpu_lack_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_kernels(settings(changes), is_on_gpu=True)
    assert expected in str(caught.value)


def test_transformer_engine_installed_and_gone_since_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(FP8)
    monkeypatch.setattr(transformer_config, "has_transformer_engine", lambda: False)
    with pytest.raises(ConfigError, match="not used here: it is not installed"):
        check_kernels(config, is_on_gpu=True)


WITHOUT_EFFECT: list[tuple[dict[str, Any], bool, str]] = [
    ({"--attention-backend": "unfused"}, False, "--attention-backend unfused has no effect"),
    ({"--attention-backend": "local"}, False, "--attention-backend local has no effect"),
    ({"--attention-softmax-in-fp32": None}, False, "--attention-softmax-in-fp32 has no effect"),
    ({"--apply-query-key-layer-scaling": None}, False, "--apply-query-key-layer-scaling has no effect"),
    ({"--masked-softmax-fusion": None}, True, "--masked-softmax-fusion has no effect"),
    ({"--persist-layer-norm": None}, True, "--persist-layer-norm has no effect"),
    ({"--attention-softmax-in-fp32": None}, True, "--attention-softmax-in-fp32 has no effect"),
]


@pytest.mark.parametrize(("changes", "is_on_gpu", "expected"), WITHOUT_EFFECT)
def test_what_changes_nothing_is_named_once(
    changes: dict[str, Any],
    is_on_gpu: bool,
    expected: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING)
    check_kernels(settings(changes), is_on_gpu=is_on_gpu)
    assert [record.message.split(":")[0] for record in caplog.records] == [expected]


@pytest.mark.parametrize("is_on_gpu", [False, True])
def test_the_defaults_are_quiet(is_on_gpu: bool, caplog: pytest.LogCaptureFixture) -> None:
    check_kernels(settings({}), is_on_gpu=is_on_gpu)
    assert not caplog.records


def test_a_teacher_takes_the_kernels_that_are_there() -> None:
    """It is built from its checkpoint's settings, which may have been made for another machine."""
    changes = {**GELU, "--bias-gelu-fusion": None, "--masked-softmax-fusion": None, **LOCAL}
    core = build_transformer_config(settings(changes), is_on_gpu=False)
    assert not core.bias_activation_fusion
    assert not core.masked_softmax_fusion
    values = torch.linspace(-2, 2, 5)
    assert torch.equal(core.activation_func(values), F.gelu(values, approximate="tanh")), "as it was trained"


def test_models_of_stock_layers_leave_transformer_engines_environment_alone(
    one_process: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student with another --attention-backend than its teacher had; megatron-core would fail an assertion."""
    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for backend in ("auto", "unfused", "local"):
        config = settings({"--attention-backend": backend})
        build_student(config, one_process, vocab_size=61, padded_vocab_size=72)
    assert not [name for name in names if name in os.environ]


def test_a_run_is_refused_before_it_trains(pool: RankPool) -> None:
    words = arguments(TINY_STUDENT, {"--mock-data": None, "--cross-entropy-loss-fusion": None})
    (message,) = pool.run(1, refusal, words)
    assert message is not None
    assert "no such fused kernel on CPU" in message


@pytest.mark.parametrize(
    ("changes", "connections", "capability", "expected"),
    [
        ({"--tensor-model-parallel-size": 2}, None, 9, "and it is not set"),
        ({"--tensor-model-parallel-size": 2}, "8", 9, "and it is 8"),
        ({"--context-parallel-size": 2}, None, 9, "and it is not set"),
        ({"--tensor-model-parallel-size": 2}, "1", 9, None),
        ({"--tensor-model-parallel-size": 2}, None, 10, None),
        ({"--pipeline-model-parallel-size": 2}, None, 9, None),
    ],
)
def test_overlap_without_one_connection_is_told(
    changes: dict[str, Any],
    connections: str | None,
    capability: int,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    logged: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if connections is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    check_kernels(settings({"--bf16": None, **changes}, 2), is_on_gpu=True)
    told = [line for record in logged.records if "CUDA_DEVICE_MAX" in (line := record.message)]
    assert len(told) == (expected is not None)
    assert expected is None or expected in told[0]
