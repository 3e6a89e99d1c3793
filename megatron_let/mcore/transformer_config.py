"""From our settings to megatron-core's TransformerConfig."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.optional import has_fused_weight_gradient, has_transformer_engine


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Return the type activations and model weights are kept in: bf16, fp16 or fp32."""
    if config.transformer.bf16:
        return torch.bfloat16
    return torch.float16 if config.transformer.fp16 else torch.float32


def uses_transformer_engine(config: RunConfig, *, is_on_gpu: bool) -> bool:
    """Return whether the student is built from Transformer Engine's layers.

    Raises:
        ConfigError: they were asked for by name and cannot be had.
    """
    wanted = config.model.transformer_impl
    if wanted == "transformer_engine" and not (is_on_gpu and has_transformer_engine()):
        raise ConfigError(
            "--transformer-impl transformer_engine needs a GPU and Transformer Engine; use local or auto"
        )
    return wanted != "local" and is_on_gpu and has_transformer_engine()


def build_transformer_config(config: RunConfig, *, is_on_gpu: bool) -> TransformerConfig:
    """Build megatron-core's TransformerConfig for this run.

    Raises:
        ConfigError: megatron-core refuses the combination; its own reason is quoted.
    """
    values: dict[str, Any] = dataclasses.asdict(config.transformer)
    values.update(_activation(config, is_on_gpu=is_on_gpu))
    dtype = compute_dtype(config)
    has_virtual_stages = config.transformer.virtual_pipeline_model_parallel_size is not None
    values.update(
        params_dtype=dtype,
        # Stages send each other the residual stream.
        pipeline_dtype=torch.float32 if config.transformer.fp32_residual_connection else dtype,
        # Virtual stages overlap their sends, and megatron-core 0.16 frees an output while its send may still read it.
        deallocate_pipeline_outputs=not has_virtual_stages,
        # Batched p2p mixes up the messages of virtual stages between the same two ranks.
        overlap_p2p_comm=has_virtual_stages,
        batch_p2p_comm=not has_virtual_stages,
        use_cpu_initialization=values["use_cpu_initialization"] or not is_on_gpu,
    )
    values.update(_resolve_fusions(config, values, is_on_gpu=is_on_gpu))
    if not values["perform_initialization"]:
        # megatron-core marks a weight as a shard where it draws it; unmarked, the gradient norm counts one rank's shard alone.
        values.update(
            dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), _leave)
        )
        values["perform_initialization"] = True
    if values["recompute_modules"] is not None:
        values["recompute_modules"] = list(values["recompute_modules"])
    try:
        return TransformerConfig(**values)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"megatron-core refuses these settings: {' '.join(str(error).split())}") from error


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _activation(config: RunConfig, *, is_on_gpu: bool) -> dict[str, Any]:
    if config.model.swiglu:
        fusion = config.model.bias_swiglu_fusion
        return {"activation_func": F.silu, "gated_linear_unit": True, "bias_activation_fusion": fusion}
    if config.model.squared_relu:
        # megatron-core's is compiled at its first call: on CPU that takes a C++ compiler and most of a minute
        function = squared_relu if is_on_gpu else _squared_relu
        return {"activation_func": function, "gated_linear_unit": False, "bias_activation_fusion": False}
    # Fused bias + GELU is the tanh approximation; plain GELU is the exact one. On CPU a teacher trained so still needs it.
    fusion = bool(config.model.bias_gelu_fusion)
    function = _tanh_gelu if fusion and not is_on_gpu else F.gelu
    return {"activation_func": function, "gated_linear_unit": False, "bias_activation_fusion": fusion}


def _tanh_gelu(values: torch.Tensor) -> torch.Tensor:
    return F.gelu(values, approximate="tanh")


def _squared_relu(values: torch.Tensor) -> torch.Tensor:
    return F.relu(values).square()


def available_fusions(config: RunConfig, *, is_on_gpu: bool) -> dict[str, bool]:
    """Return whether the kernel of each fusion exists here, for the layers that the student gets."""
    has_te_layers = uses_transformer_engine(config, is_on_gpu=is_on_gpu)
    return {
        "gradient_accumulation_fusion": not is_on_gpu or has_fused_weight_gradient(),
        "masked_softmax_fusion": has_te_layers,
        "bias_dropout_fusion": is_on_gpu,
        "apply_rope_fusion": is_on_gpu and has_transformer_engine(),
        "persist_layer_norm": has_te_layers,
        "bias_activation_fusion": is_on_gpu,
    }


def _resolve_fusions(config: RunConfig, values: dict[str, Any], *, is_on_gpu: bool) -> dict[str, bool]:
    """Return each fusion as on unless it was turned off or its kernel does not exist here."""
    available = available_fusions(config, is_on_gpu=is_on_gpu)
    return {name: is_there and values[name] is not False for name, is_there in available.items()}
