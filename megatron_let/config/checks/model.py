"""Rules on the student's shape, its number types and the kernels asked for."""

from __future__ import annotations

from megatron_let.config.checks.rules import (
    Packages,
    flag_of,
    given,
    require,
    require_divisible,
    require_takes_effect,
)
from megatron_let.config.run_config import RunConfig


def check_shape(config: RunConfig) -> None:
    """Heads, groups, activation: what has to divide and what excludes what."""
    model, transformer = config.model, config.transformer
    heads, groups = transformer.num_attention_heads, transformer.num_query_groups
    if transformer.kv_channels is None:
        hint = "change one of them or give --kv-channels"
        require_divisible(transformer.hidden_size, heads, "--hidden-size", "--num-attention-heads", hint)
    if not model.group_query_attention:
        require(
            groups in (None, heads),
            f"--num-query-groups {groups} cannot take effect without --group-query-attention; add it",
        )
    elif groups is not None:
        hint = "use a divisor of the heads"
        require_divisible(heads, groups, "--num-attention-heads", "--num-query-groups", hint)
    require(
        not (model.swiglu and model.squared_relu),
        "--swiglu and --squared-relu are two activations; leave one out",
    )


def check_positions(config: RunConfig) -> None:
    """Length of sequences and kind of position embedding."""
    model, transformer = config.model, config.transformer
    kind = model.position_embedding_type
    length, positions = model.seq_length, model.max_position_embeddings
    require(
        length <= positions,
        f"--seq-length {length} is longer than --max-position-embeddings {positions}; shorten the "
        "sequence or allow more positions",
    )
    require(
        model.add_position_embedding or kind == "rope",
        f"--no-position-embedding goes with rope only, got --position-embedding-type {kind}; use "
        "--position-embedding-type none",
    )
    require(
        model.use_rope_scaling or not given(model, "rope_scaling_factor"),
        "--rope-scaling-factor cannot take effect without --use-rope-scaling; add it or leave the flag out",
    )
    if kind != "rope":
        needs = "--position-embedding-type rope"
        rope_only = (
            "rotary_base",
            "rotary_percent",
            "rotary_seq_len_interpolation_factor",
            "use_rope_scaling",
        )
        require_takes_effect(model, *rope_only, needs=needs)
        require_takes_effect(transformer, "rotary_interleaved", needs=needs)
    elif transformer.kv_channels is not None:
        rotated = int(transformer.kv_channels * model.rotary_percent)
        require(
            rotated > 0 and rotated % 2 == 0,
            f"rope turns pairs of dimensions, but --rotary-percent {model.rotary_percent} of {transformer.kv_channels} "
            f"gives {rotated}; choose an even number",
        )


def check_precision(config: RunConfig, packages: Packages) -> None:
    """fp16, bf16, fp8 and what belongs to each."""
    transformer, optimizer = config.transformer, config.optimizer
    fp16, bf16 = transformer.fp16, transformer.bf16
    require(not (fp16 and bf16), "--fp16 and --bf16 exclude each other; leave one out")
    if not (fp16 or bf16):
        require_takes_effect(transformer, "fp32_residual_connection", needs="--bf16 or --fp16")
    if not bf16:
        require_takes_effect(config.parallel, "grad_reduce_in_bf16", needs="--bf16")
    require(
        not (config.parallel.grad_reduce_in_bf16 and config.ddp.grad_reduce_in_fp32),
        "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32 exclude each other; leave one out",
    )
    scaling = ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    if not fp16:
        require_takes_effect(optimizer, *scaling, needs="--fp16")
    elif optimizer.loss_scale is not None:
        require(
            not given(optimizer, *scaling[1:]),
            f"--loss-scale is fixed, so {', '.join(given(optimizer, *scaling[1:]))} cannot take effect; leave one out",
        )
    _check_fp8(config, packages)


def _check_fp8(config: RunConfig, packages: Packages) -> None:
    """FP8 runs on Transformer Engine alone; megatron-core would train in bf16 without a word."""
    transformer, optimizer = config.transformer, config.optimizer
    if transformer.fp8 is None:
        require_takes_effect(
            transformer,
            *("fp8_recipe", "fp8_param", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"),
            *("fp8_wgrad", "first_last_layers_bf16"),
            needs="--fp8-format",
        )
    else:
        _require_transformer_engine(config, packages, f"--fp8-format {transformer.fp8}")
    if not transformer.first_last_layers_bf16:
        bf16_layers = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
        require_takes_effect(transformer, *bf16_layers, needs="--first-last-layers-bf16")
    if transformer.fp8_param:
        require(
            optimizer.use_distributed_optimizer,
            "--fp8-param-gather needs --use-distributed-optimizer; add it or leave the flag out",
        )
    if optimizer.reuse_grad_buf_for_mxfp8_param_ag:
        require(
            transformer.fp8_param and transformer.fp8_recipe == "mxfp8",
            "--reuse-grad-buf-for-mxfp8-param-ag needs --fp8-param-gather and --fp8-recipe mxfp8",
        )


def check_kernels(config: RunConfig, packages: Packages) -> None:
    """Kernels asked for by name must be there."""
    model, transformer = config.model, config.transformer
    if model.transformer_impl == "transformer_engine":
        _require_transformer_engine(config, packages, "--transformer-impl transformer_engine")
    backend = transformer.attention_backend.name
    require(
        not model.use_flash_attn or backend == "flash",
        f"--use-flash-attn contradicts --attention-backend {backend}; leave one out",
    )
    if backend in ("flash", "fused"):
        _require_transformer_engine(config, packages, f"--attention-backend {backend}")
    if transformer.context_parallel_size > 1:
        _require_transformer_engine(
            config, packages, f"--context-parallel-size {transformer.context_parallel_size}"
        )
    _check_cross_entropy(config, packages)
    _check_fusions(config, packages)


def _check_cross_entropy(config: RunConfig, packages: Packages) -> None:
    """Fused cross entropy."""
    transformer = config.transformer
    if not transformer.cross_entropy_loss_fusion:
        require_takes_effect(transformer, "cross_entropy_fusion_impl", needs="--cross-entropy-loss-fusion")
    elif transformer.cross_entropy_fusion_impl == "te":
        _require_transformer_engine(config, packages, "--cross-entropy-fusion-impl te")
    require(
        not (transformer.deterministic_mode and transformer.cross_entropy_loss_fusion),
        "--deterministic-mode excludes --cross-entropy-loss-fusion, which is not deterministic; leave one out",
    )


def _check_fusions(config: RunConfig, packages: Packages) -> None:
    """Fusions asked for with --x-fusion; those that are merely not forbidden are chosen while building."""
    model, transformer = config.model, config.transformer
    require(
        not model.bias_gelu_fusion or (transformer.add_bias_linear and not model.swiglu),
        "--bias-gelu-fusion needs GELU and a bias; leave out --swiglu and --disable-bias-linear, or the fusion",
    )
    require(
        not model.bias_swiglu_fusion or model.swiglu,
        "--bias-swiglu-fusion cannot take effect without --swiglu; add it",
    )
    require(
        not transformer.apply_rope_fusion or model.position_embedding_type == "rope",
        "--rope-fusion cannot take effect without --position-embedding-type rope",
    )
    fusions = (
        "gradient_accumulation_fusion",
        "apply_rope_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
    )
    asked = [flag_of(transformer, name) for name in fusions if getattr(transformer, name)]
    require(
        not asked or packages.transformer_engine or packages.apex,
        f"{', '.join(asked)} needs the kernels of Transformer Engine or apex, and neither is installed; install one "
        "or leave the flag out",
    )


def _require_transformer_engine(config: RunConfig, packages: Packages, what: str) -> None:
    """Raise ConfigError unless Transformer Engine is installed and not switched off."""
    require(
        packages.transformer_engine,
        f"{what} needs Transformer Engine, which is not installed; install it (extra [gpu]) or leave the flag out",
    )
    require(
        config.model.transformer_impl != "local",
        f"{what} needs Transformer Engine's layers, but --transformer-impl is local; leave one out",
    )


def check_recompute(config: RunConfig) -> None:
    """Combinations of --recompute-*."""
    transformer = config.transformer
    granularity, method = transformer.recompute_granularity, transformer.recompute_method
    require(
        not (config.training.recompute_activations and granularity == "full"),
        "--recompute-activations means selective, but --recompute-granularity is full; leave one out",
    )
    if granularity == "full":
        require(
            method is not None and transformer.recompute_num_layers is not None,
            "--recompute-granularity full needs --recompute-method {uniform,block} and --recompute-num-layers N",
        )
        require(
            not given(transformer, "recompute_modules"),
            "--recompute-modules goes with selective, not with full",
        )
    else:
        only_full = ("recompute_method", "recompute_num_layers", "distribute_saved_activations")
        require_takes_effect(transformer, *only_full, needs="--recompute-granularity full")
    if granularity is None:
        require_takes_effect(transformer, "recompute_modules", needs="--recompute-granularity selective")
    if transformer.distribute_saved_activations:
        require(
            transformer.tensor_model_parallel_size > 1 and not transformer.sequence_parallel,
            "--distribute-saved-activations needs --tensor-model-parallel-size of 2 or more and no --sequence-parallel",
        )
