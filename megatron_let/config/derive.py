"""Fill the settings that follow from others, by Megatron-LM's rules.

`derive` needs the settings alone, `resolve` also the number of ranks. Both leave a value that was given as it is
and can be applied again to their own result. What contradicts is left for `validate` to name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from megatron_let.config.batches import batch_plan, virtual_pipeline_size
from megatron_let.config.checks.rules import Packages, given
from megatron_let.config.run_config import RunConfig
from megatron_let.config.validate import validate

DEFAULT_SPLIT = "969,30,1"


def derive(config: RunConfig, *, warn: Callable[[str], None]) -> RunConfig:
    """Return `config` with what follows from the settings alone; `warn` is told what was turned off."""
    config = _derive_old_spellings(config)
    config = _derive_recompute(config, warn)
    config = _derive_shapes(config)
    config = _derive_precision(config)
    config = _derive_parallelism(config, warn)
    config = _derive_schedule(config)
    return _derive_data(config)


def resolve(config: RunConfig, world_size: int, packages: Packages | None = None) -> RunConfig:
    """Return the settings of a run on `world_size` ranks, with the global batch size as a number.

    Validates first, so what comes back is a run that can start; `packages` as there. Raises ConfigError. LET's layer
    and S_stop stay as given: on resume the checkpoint has a say in them.
    """
    validate(config, world_size, packages)
    return _replace(config, "training", global_batch_size=batch_plan(config, world_size).full)


def _derive_old_spellings(config: RunConfig) -> RunConfig:
    """Translate Megatron-LM's old flags into those that replaced them."""
    transformer = config.transformer
    if config.model.use_rotary_position_embeddings:
        config = _replace(config, "model", position_embedding_type="rope")
    if config.model.use_flash_attn and transformer.attention_backend.name == "auto":
        backends = type(transformer.attention_backend)
        config = _replace(config, "transformer", attention_backend=backends["flash"])
    if config.training.recompute_activations and transformer.recompute_granularity is None:
        config = _replace(config, "transformer", recompute_granularity="selective")
    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type is None and tokenizer.vocab_file and tokenizer.merge_file:
        config = _replace(config, "tokenizer", tokenizer_type="GPT2BPETokenizer")
    return config


def _derive_recompute(config: RunConfig, warn: Callable[[str], None]) -> RunConfig:
    """Leave out how to recompute where nothing is to be recomputed, as Megatron-LM does."""
    transformer = config.transformer
    if transformer.recompute_granularity is not None:
        return config
    idle = given(transformer, "recompute_method", "recompute_num_layers")
    if idle:
        warn(f"{', '.join(idle)} has no effect without --recompute-granularity full")
    return _replace(config, "transformer", recompute_method=None, recompute_num_layers=None)


def _derive_shapes(config: RunConfig) -> RunConfig:
    """Fill the widths of the model."""
    model, transformer = config.model, config.transformer
    hidden, heads = transformer.hidden_size, transformer.num_attention_heads
    config = _fill(config, "model", max_position_embeddings=model.seq_length)
    if hidden:
        # Gated MLPs have three matrices instead of two: 2/3 of the width keeps the parameters, in steps of 64.
        gated, plain = int((4 * hidden * 2 / 3) / 64) * 64, 4 * hidden
        config = _fill(config, "transformer", ffn_hidden_size=gated if model.swiglu else plain)
    if hidden and heads and hidden % heads == 0:
        config = _fill(config, "transformer", kv_channels=hidden // heads)
    config = _fill(config, "transformer", num_query_groups=1 if model.group_query_attention else heads)
    if transformer.add_bias_linear:
        config = _replace(config, "transformer", add_qkv_bias=True)
    else:
        config = _fill(config, "model", bias_gelu_fusion=False)
    if model.position_embedding_type != "rope":
        config = _fill(config, "transformer", apply_rope_fusion=False)
    return config


def _derive_precision(config: RunConfig) -> RunConfig:
    """Fill the number types of gradients and softmax."""
    transformer = config.transformer
    if transformer.bf16 and not config.parallel.grad_reduce_in_bf16:
        config = _replace(config, "ddp", grad_reduce_in_fp32=True)
    if transformer.apply_query_key_layer_scaling:
        config = _replace(config, "transformer", attention_softmax_in_fp32=True)
    return config


def _derive_parallelism(config: RunConfig, warn: Callable[[str], None]) -> RunConfig:
    """Fill the interleaved schedule's numbers and turn off what one rank cannot split."""
    chunks = virtual_pipeline_size(config)
    config = _replace(config, "transformer", virtual_pipeline_model_parallel_size=chunks)
    if chunks is None:
        config = _replace(config, "ddp", align_param_gather=False)
    if config.transformer.sequence_parallel and config.transformer.tensor_model_parallel_size == 1:
        warn("--sequence-parallel is off: it splits over tensor-parallel ranks, and there is one")
        config = _replace(config, "transformer", sequence_parallel=False)
    return config


def _derive_schedule(config: RunConfig) -> RunConfig:
    """Fill the decay length and constant weight decay."""
    training, schedule = config.training, config.schedule
    if training.train_iters is not None and schedule.lr_decay_samples is None:
        config = _fill(config, "schedule", lr_decay_iters=training.train_iters)
    if training.train_samples is not None and schedule.lr_decay_iters is None:
        config = _fill(config, "schedule", lr_decay_samples=training.train_samples)
    if schedule.weight_decay_incr_style == "constant":
        constant = config.optimizer.weight_decay
        config = _fill(config, "schedule", start_weight_decay=constant, end_weight_decay=constant)
    return config


def _derive_data(config: RunConfig) -> RunConfig:
    """Fill the split of a single data source."""
    if config.data.data_path or config.data.mock_data:
        config = _fill(config, "data", split=DEFAULT_SPLIT)
    return config


def _replace(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    """Return `config` with fields of one section changed."""
    changed: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **changes)}
    return dataclasses.replace(config, **changed)


def _fill(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """Return `config` with those fields of one section set that are None."""
    current = getattr(config, section)
    missing = {name: value for name, value in values.items() if getattr(current, name) is None}
    return _replace(config, section, **missing) if missing else config
