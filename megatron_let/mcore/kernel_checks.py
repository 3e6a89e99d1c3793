"""Kernels asked for by name, held against the layers that the student gets here: refused, or named as without effect.

`config/validate.py` knows what is installed; whether it is used also depends on the device, which is known here.
"""

from __future__ import annotations

import os

import torch

from megatron_let.config.checks.rules import flag_of, require
from megatron_let.config.run_config import RunConfig
from megatron_let.log import LOGGER
from megatron_let.mcore.transformer_config import available_fusions, uses_transformer_engine


def check_kernels(config: RunConfig, *, is_on_gpu: bool) -> None:
    """Refuse what the student's layers cannot do, and warn once of each flag that changes nothing with them.

    Raises:
        ConfigError: a kernel or number type was asked for by name and cannot be had.
    """
    _check_fusions(config, is_on_gpu=is_on_gpu)
    if is_on_gpu:
        _check_connections(config)
    if uses_transformer_engine(config, is_on_gpu=is_on_gpu):
        _check_transformer_engine(config)
    else:
        _check_stock_layers(config, is_on_gpu=is_on_gpu)


def _check_connections(config: RunConfig) -> None:
    """Warn where kernels and messages that are to overlap may reach the GPU in another order than they were given.

    From compute capability 10 on it does not matter (as in Megatron-LM, which refuses to start).
    """
    transformer, number = config.transformer, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    ranks = transformer.tensor_model_parallel_size * transformer.context_parallel_size
    if ranks == 1 or number == "1" or torch.cuda.get_device_capability()[0] >= 10:
        return
    LOGGER.warning(
        "tensor and context parallelism overlap communication with computation only with CUDA_DEVICE_MAX_CONNECTIONS=1 in "
        f"the environment, and it is {'not set' if number is None else number}; export it before the launch"
    )


def _check_fusions(config: RunConfig, *, is_on_gpu: bool) -> None:
    model, transformer = config.model, config.transformer
    available = available_fusions(config, is_on_gpu=is_on_gpu)
    asked = [
        flag_of(transformer, name)
        for name in available
        if name != "bias_activation_fusion" and getattr(transformer, name) and not available[name]
    ]
    if not is_on_gpu:
        names = ("bias_gelu_fusion", "bias_swiglu_fusion")
        asked += [flag_of(model, name) for name in names if getattr(model, name)]
        asked += ["--cross-entropy-loss-fusion"] * transformer.cross_entropy_loss_fusion
    where = "with these layers" if is_on_gpu else "on CPU"
    require(
        not asked,
        f"{', '.join(asked)}: there is no such fused kernel {where}; leave the flag out to use what there is",
    )


def _check_transformer_engine(config: RunConfig) -> None:
    transformer = config.transformer
    require(
        not transformer.fp32_residual_connection,
        "--fp32-residual-connection needs the stock layers: megatron-core's with Transformer Engine add in 16 bits; give "
        "--transformer-impl local",
    )
    require(
        transformer.attention_backend.name != "local",
        "--attention-backend local leaves Transformer Engine's layers no attention; give --transformer-impl local",
    )
    require(
        not transformer.apply_query_key_layer_scaling or os.environ.get("NVTE_APPLY_QK_LAYER_SCALING") == "1",
        "--apply-query-key-layer-scaling: Transformer Engine takes it from the environment; set "
        "NVTE_APPLY_QK_LAYER_SCALING=1 or leave the flag out",
    )
    why = "Transformer Engine's layers choose their own kernel"
    _warn_without_effect(config, "masked_softmax_fusion", "persist_layer_norm", why=why)
    if not transformer.apply_query_key_layer_scaling:
        _warn_without_effect(
            config, "attention_softmax_in_fp32", why="Transformer Engine's softmax is always in fp32"
        )


def _check_stock_layers(config: RunConfig, *, is_on_gpu: bool) -> None:
    model, transformer = config.model, config.transformer
    backend = transformer.attention_backend.name
    needing = {
        f"--fp8-format {transformer.fp8}": transformer.fp8 is not None,
        f"--context-parallel-size {transformer.context_parallel_size}": transformer.context_parallel_size > 1,
        f"--attention-backend {backend}": backend in ("flash", "fused"),
    }
    why = "--transformer-impl is local" if model.transformer_impl == "local" else "it is not installed"
    why = why if is_on_gpu else "no GPU is visible"
    asked = [flag for flag, is_asked in needing.items() if is_asked]
    require(
        not asked, f"{', '.join(asked)} needs Transformer Engine's layers, which are not used here: {why}"
    )
    if backend in ("unfused", "local"):
        LOGGER.warning(
            f"--attention-backend {backend} has no effect: the stock layers take PyTorch's attention"
        )
    why = "the softmax of PyTorch's attention is always in fp32"
    if transformer.apply_query_key_layer_scaling:
        _warn_without_effect(config, "apply_query_key_layer_scaling", why=why)
    else:
        _warn_without_effect(config, "attention_softmax_in_fp32", why=why)


def _warn_without_effect(config: RunConfig, *names: str, why: str) -> None:
    for name in names:
        if getattr(config.transformer, name):
            LOGGER.warning(f"{flag_of(config.transformer, name)} has no effect: {why}")
