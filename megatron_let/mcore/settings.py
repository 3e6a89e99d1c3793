"""Which fields of megatron-core's dataclasses a user may set, and Megatron-LM's spelling of each.

Where megatron-core and Megatron-LM disagree on a default, Megatron-LM's stands here. A fused kernel's default
is None: used where it is available; asked for by name and absent it is an error.
"""

from __future__ import annotations

from typing import Literal

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_let.config.core_settings import Exposed, settings_class
from megatron_let.config.run_config import CoreSections

OptionalSwitch = bool | None


def _fused(name: str, flag: str, help: str) -> Exposed:
    """Return a kernel fusion that is on where available, forced by `--flag`, off by `--no-flag`."""
    return Exposed(
        name,
        flags=(f"--{flag}",),
        off_flags=(f"--no-{flag}",),
        default=None,
        annotation=OptionalSwitch,
        help=help + " Default: where a fused kernel is available.",
    )


_MODEL = (
    Exposed("num_layers"),
    Exposed("hidden_size"),
    Exposed("ffn_hidden_size", help="Width of the MLP. Default: 4 times the hidden size, 8/3 with --swiglu."),
    Exposed("num_attention_heads"),
    Exposed("num_query_groups", default=None, help="Key/value heads of --group-query-attention. Default: 1."),
    Exposed("kv_channels", help="Width of an attention head. Default: hidden size / heads."),
    Exposed("normalization"),
    Exposed("layernorm_epsilon"),
    Exposed("layernorm_zero_centered_gamma"),
    Exposed("qk_layernorm"),
    Exposed("add_bias_linear", help="--disable-bias-linear: no bias in any linear layer."),
    Exposed("add_qkv_bias"),
    Exposed("rotary_interleaved"),
    Exposed("hidden_dropout"),
    Exposed("attention_dropout"),
    Exposed("attention_backend", help="Attention kernel; auto lets Transformer Engine or PyTorch choose."),
    Exposed("init_method_std"),
    Exposed("embedding_init_method_std"),
    Exposed("perform_initialization", help="--no-initialization: leave weights as allocated."),
    Exposed("use_cpu_initialization", default=False),
    Exposed("calculate_per_token_loss"),
)

_PRECISION = (
    Exposed("fp16"),
    Exposed("bf16"),
    Exposed("fp32_residual_connection"),
    Exposed("apply_query_key_layer_scaling"),
    Exposed("attention_softmax_in_fp32", default=False),
    Exposed("disable_bf16_reduced_precision_matmul"),
    Exposed("deterministic_mode"),
    Exposed("fp8"),
    Exposed("fp8_recipe", annotation=Literal["tensorwise", "delayed", "mxfp8", "blockwise"]),
    Exposed("fp8_param", dest="fp8_param_gather"),
    Exposed("fp8_margin"),
    Exposed("fp8_amax_history_len"),
    Exposed("fp8_amax_compute_algo"),
    Exposed("fp8_wgrad", off_flags=("--no-fp8-wgrad", "--disable-fp8-wgrad")),
    Exposed("first_last_layers_bf16"),
    Exposed("num_layers_at_start_in_bf16"),
    Exposed("num_layers_at_end_in_bf16"),
)

_PARALLELISM = (
    Exposed("tensor_model_parallel_size"),
    Exposed("sequence_parallel"),
    Exposed("pipeline_model_parallel_size"),
    Exposed("virtual_pipeline_model_parallel_size", flags=()),
    Exposed("num_layers_in_first_pipeline_stage", dest="decoder_first_pipeline_num_layers"),
    Exposed("num_layers_in_last_pipeline_stage", dest="decoder_last_pipeline_num_layers"),
    Exposed("account_for_embedding_in_pipeline_split"),
    Exposed("account_for_loss_in_pipeline_split"),
    Exposed("microbatch_group_size_per_vp_stage"),
    Exposed(
        "overlap_p2p_comm",
        default=True,
        off_flags=("--no-overlap-p2p-communication",),
        help="Overlap pipeline messages with work; only the interleaved schedule can.",
    ),
    Exposed("overlap_p2p_comm_warmup_flush"),
    Exposed("context_parallel_size"),
    Exposed(
        "cp_comm_type",
        annotation=Literal["p2p", "all_gather", "a2a"],
        default="p2p",
        help="How context-parallel ranks exchange keys and values.",
    ),
)

_KERNELS = (
    _fused(
        "gradient_accumulation_fusion", "gradient-accumulation-fusion", "Add weight gradients in the GEMM."
    ),
    _fused("masked_softmax_fusion", "masked-softmax-fusion", "Fuse scaling, mask and softmax."),
    _fused("bias_dropout_fusion", "bias-dropout-fusion", "Fuse bias, dropout and residual addition."),
    _fused("apply_rope_fusion", "rope-fusion", "Rotate with a fused kernel."),
    _fused("persist_layer_norm", "persist-layer-norm", "Use the persistent layer norm kernel."),
    Exposed("cross_entropy_loss_fusion"),
    Exposed("cross_entropy_fusion_impl"),
    Exposed(
        "clone_scatter_output_in_embedding",
        off_flags=("--no-clone-scatter-output-in-embedding", "--disable-clone-scatter-output-in-embedding"),
    ),
)

_RECOMPUTE = (
    Exposed(
        "recompute_granularity",
        help="Recompute activations in backward: full is the whole layer, selective only --recompute-modules.",
    ),
    Exposed(
        "recompute_method",
        help="With full: uniform recomputes in units of --recompute-num-layers layers, block only the first "
        "--recompute-num-layers layers of each model chunk.",
    ),
    Exposed("recompute_num_layers", help="Layers of a unit (uniform) or of a model chunk (block)."),
    Exposed(
        "recompute_modules",
        annotation=tuple[Literal["core_attn", "layernorm", "mlp"], ...],
        default=None,
        help="Parts that selective recomputes. Default: core_attn.",
    ),
    Exposed("distribute_saved_activations", annotation=bool),
)

TransformerSettings = settings_class(
    "TransformerSettings",
    TransformerConfig,
    exposed=(*_MODEL, *_PARALLELISM, *_PRECISION, *_KERNELS, *_RECOMPUTE),
    module=__name__,
    doc="Settable fields of megatron.core's TransformerConfig.",
)

OptimizerSettings = settings_class(
    "OptimizerSettings",
    OptimizerConfig,
    exposed=(
        Exposed("optimizer", annotation=Literal["adam", "sgd"], help="Optimizer."),
        Exposed("lr", help="Largest learning rate."),
        Exposed("min_lr", default=0.0, help="Smallest learning rate of the decay."),
        Exposed("decoupled_lr"),
        Exposed("decoupled_min_lr"),
        Exposed("weight_decay"),
        Exposed("apply_wd_to_qk_layernorm"),
        Exposed("clip_grad", help="Clip gradients to this global L2 norm; 0 turns clipping off."),
        Exposed("adam_beta1"),
        Exposed("adam_beta2"),
        Exposed("adam_eps"),
        Exposed("sgd_momentum"),
        Exposed("fp16"),
        Exposed("bf16"),
        Exposed(
            "fp8_recipe", annotation=Literal["tensorwise", "delayed", "mxfp8", "blockwise"], default="delayed"
        ),
        Exposed("loss_scale"),
        Exposed("initial_loss_scale"),
        Exposed("min_loss_scale"),
        Exposed("loss_scale_window"),
        Exposed("hysteresis"),
        Exposed("use_distributed_optimizer"),
        Exposed("overlap_param_gather"),
        Exposed("reuse_grad_buf_for_mxfp8_param_ag"),
        Exposed("log_num_zeros_in_grad"),
    ),
    module=__name__,
    doc="Settable fields of megatron.core's OptimizerConfig.",
)

DdpSettings = settings_class(
    "DdpSettings",
    DistributedDataParallelConfig,
    exposed=(
        Exposed(
            "grad_reduce_in_fp32",
            dest="accumulate_allreduce_grads_in_fp32",
            help="Accumulate and reduce gradients in fp32; a bf16 run does unless --grad-reduce-in-bf16.",
        ),
        Exposed("overlap_grad_reduce"),
        Exposed("use_distributed_optimizer"),
        Exposed("overlap_param_gather"),
        Exposed(
            "align_param_gather",
            default=True,
            help="Launch parameter gathers on all pipeline stages together; only the interleaved schedule can.",
        ),
        Exposed(
            "check_for_nan_in_grad",
            dest="check_for_nan_in_loss_and_grad",
            default=True,
            help="Stop at a NaN or infinity in the loss or a gradient. Off with dynamic loss scaling.",
        ),
        Exposed("check_for_large_grads"),
        Exposed("bucket_size", dest="ddp_bucket_size"),
        Exposed("pad_buckets_for_high_nccl_busbw", dest="ddp_pad_buckets_for_high_nccl_busbw"),
        Exposed("reduce_scatter_with_fp32_accumulation", dest="ddp_reduce_scatter_with_fp32_accumulation"),
        Exposed("average_in_collective", dest="ddp_average_in_collective"),
        Exposed("fp8_param_gather"),
        Exposed("reuse_grad_buf_for_mxfp8_param_ag"),
    ),
    module=__name__,
    doc="Settable fields of megatron.core's DistributedDataParallelConfig.",
)

CORE_SECTIONS = CoreSections(transformer=TransformerSettings, optimizer=OptimizerSettings, ddp=DdpSettings)
