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
Fp8Recipe = Literal["tensorwise", "delayed", "mxfp8", "blockwise"]


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
    Exposed("num_layers", help="Transformer layers of the student."),
    Exposed("hidden_size", help="Width of the student."),
    Exposed("ffn_hidden_size", help="Width of the MLP. Default: 4 times the hidden size, 8/3 with --swiglu."),
    Exposed("num_attention_heads", help="Attention heads."),
    Exposed("num_query_groups", default=None, help="Key/value heads of --group-query-attention. Default: 1."),
    Exposed("kv_channels", help="Width of an attention head. Default: hidden size / heads."),
    Exposed("normalization", help="Kind of norm."),
    Exposed("layernorm_epsilon", help="Epsilon of every norm."),
    Exposed(
        "layernorm_zero_centered_gamma",
        help="Store a norm's weight less 1, so that weight decay pulls it to 1.",
    ),
    Exposed("qk_layernorm", help="Normalise queries and keys."),
    Exposed("add_bias_linear", help="No bias in any linear layer."),
    Exposed("add_qkv_bias", help="Bias in the query/key/value projection even without the other biases."),
    Exposed(
        "rotary_interleaved",
        help="Rotate even with odd dimensions (GPT-J) instead of first with second half (LLaMA).",
    ),
    Exposed("hidden_dropout", help="Dropout of the residual branches and embeddings."),
    Exposed("attention_dropout", help="Dropout of attention weights."),
    Exposed("attention_backend", help="Attention kernel; auto lets Transformer Engine or PyTorch choose."),
    Exposed(
        "init_method_std",
        help="Standard deviation of the initial weights; output layers of a block get less by sqrt(2 x layers).",
    ),
    Exposed(
        "embedding_init_method_std",
        help="The same for embeddings. Their weight decay stays, as in Megatron-LM 0.16 (which only says otherwise).",
    ),
    Exposed("perform_initialization", help="Leave weights as allocated, for a run that loads them."),
    Exposed(
        "use_cpu_initialization",
        default=False,
        help="Draw initial weights on the CPU: the same for every tensor-parallel size.",
    ),
    Exposed(
        "calculate_per_token_loss",
        help="Average the loss over the counted tokens of the global batch, not over microbatch means.",
    ),
)

_PRECISION = (
    Exposed("fp16", help="Train in fp16 with loss scaling."),
    Exposed("bf16", help="Train in bf16."),
    Exposed("fp32_residual_connection", help="Keep the residual stream in fp32."),
    Exposed(
        "apply_query_key_layer_scaling",
        help="Divide attention scores by the layer's number and do their softmax in fp32.",
    ),
    Exposed("attention_softmax_in_fp32", default=False, help="Do the softmax of attention in fp32."),
    Exposed(
        "disable_bf16_reduced_precision_matmul",
        help="Keep bf16 matrix products from summing in less than fp32.",
    ),
    Exposed("deterministic_mode", help="Choose deterministic kernels, slower ones where need be."),
    Exposed("fp8", help="Train in FP8: e4m3, or hybrid with e5m2 gradients. Needs Transformer Engine."),
    Exposed("fp8_recipe", annotation=Fp8Recipe, help="How FP8 scaling factors are made."),
    Exposed("fp8_param", dest="fp8_param_gather", help="Keep and gather parameters in FP8."),
    Exposed("fp8_margin", help="Margin of FP8 scaling factors."),
    Exposed("fp8_amax_history_len", help="Iterations of history behind an FP8 scaling factor."),
    Exposed("fp8_amax_compute_algo", help="Which of the history makes the scaling factor."),
    Exposed(
        "fp8_wgrad",
        help="Compute weight gradients in higher precision than FP8.",
        off_flags=("--no-fp8-wgrad", "--disable-fp8-wgrad"),
    ),
    Exposed("first_last_layers_bf16", help="Keep the first and last layers out of FP8."),
    Exposed("num_layers_at_start_in_bf16", help="How many first layers."),
    Exposed("num_layers_at_end_in_bf16", help="How many last layers."),
)

_PARALLELISM = (
    Exposed("tensor_model_parallel_size", help="Ranks that share every matrix."),
    Exposed(
        "sequence_parallel",
        help="Split activations between the matrices over the tensor-parallel ranks (arXiv 2205.05198).",
    ),
    Exposed("pipeline_model_parallel_size", help="Stages that share the layers."),
    Exposed("virtual_pipeline_model_parallel_size", flags=()),
    Exposed(
        "num_layers_in_first_pipeline_stage",
        dest="decoder_first_pipeline_num_layers",
        help="Layers of the first stage. Default: an even share.",
    ),
    Exposed(
        "num_layers_in_last_pipeline_stage",
        dest="decoder_last_pipeline_num_layers",
        help="Layers of the last stage. Default: an even share.",
    ),
    Exposed(
        "account_for_embedding_in_pipeline_split",
        help="Count the embedding as a layer when dealing layers to stages.",
    ),
    Exposed(
        "account_for_loss_in_pipeline_split", help="Count the loss as a layer when dealing layers to stages."
    ),
    Exposed(
        "microbatch_group_size_per_vp_stage",
        help="Microbatches that a model chunk takes in a row. Default: the pipeline size.",
    ),
    Exposed(
        "overlap_p2p_comm_warmup_flush",
        help="Overlap pipeline messages also while the pipeline fills and drains.",
    ),
    Exposed("context_parallel_size", help="Ranks that share every sequence. Needs Transformer Engine."),
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
    Exposed("cross_entropy_loss_fusion", help="Use a fused cross entropy."),
    Exposed("cross_entropy_fusion_impl", help="Which one: megatron-core's or Transformer Engine's."),
    Exposed(
        "clone_scatter_output_in_embedding",
        help="Let sequence parallel keep the whole embedding output in memory.",
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
    Exposed(
        "distribute_saved_activations",
        annotation=bool,
        help="Split saved activations over tensor-parallel ranks.",
    ),
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
        Exposed("decoupled_lr", help="Learning rate of the input and output layer."),
        Exposed("decoupled_min_lr", help="Smallest learning rate of the input and output layer."),
        Exposed("weight_decay", help="Weight decay of matrices; norms and biases have none."),
        Exposed("apply_wd_to_qk_layernorm", help="Weight decay also on the norms of queries and keys."),
        Exposed("clip_grad", help="Clip gradients to this global L2 norm; 0 turns clipping off."),
        Exposed("adam_beta1"),
        Exposed("adam_beta2"),
        Exposed("adam_eps"),
        Exposed("sgd_momentum"),
        Exposed("fp16"),
        Exposed("bf16"),
        Exposed("fp8_recipe", annotation=Fp8Recipe, default="delayed"),
        Exposed("loss_scale", help="Fixed loss scale of fp16. Default: dynamic."),
        Exposed("initial_loss_scale", help="First dynamic loss scale."),
        Exposed("min_loss_scale", help="Smallest dynamic loss scale."),
        Exposed("loss_scale_window", help="Good iterations after which the loss scale doubles."),
        Exposed("hysteresis", help="Overflows after which the loss scale halves."),
        Exposed("use_distributed_optimizer"),
        Exposed("overlap_param_gather"),
        Exposed("reuse_grad_buf_for_mxfp8_param_ag"),
        Exposed("log_num_zeros_in_grad", help="Report the number of zeros in the gradient."),
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
        Exposed("overlap_grad_reduce", help="Reduce gradients while the backward pass runs."),
        Exposed(
            "use_distributed_optimizer",
            help="Share the optimizer's state and work among data-parallel ranks.",
        ),
        Exposed("overlap_param_gather", help="Gather parameters while the forward pass runs."),
        Exposed(
            "align_param_gather",
            default=True,
            help="Let each stage of the interleaved schedule gather parameters when it needs them.",
        ),
        Exposed(
            "check_for_nan_in_grad",
            dest="check_for_nan_in_loss_and_grad",
            default=True,
            help="Look for NaN and infinity nowhere, the teacher included, and skip nothing: the run goes on with them.",
        ),
        Exposed("check_for_large_grads", help="Warn of an unexpectedly large gradient; the run goes on."),
        Exposed(
            "bucket_size",
            dest="ddp_bucket_size",
            help="Parameters in a gradient bucket. Default: 40 million or more.",
        ),
        Exposed(
            "pad_buckets_for_high_nccl_busbw",
            dest="ddp_pad_buckets_for_high_nccl_busbw",
            help="Pad buckets to a size that NCCL moves fast at large data-parallel sizes.",
        ),
        Exposed(
            "reduce_scatter_with_fp32_accumulation",
            dest="ddp_reduce_scatter_with_fp32_accumulation",
            help="Send gradients in 16 bits but sum them in fp32.",
        ),
        Exposed(
            "average_in_collective",
            dest="ddp_average_in_collective",
            help="Average gradients inside the collective.",
        ),
        Exposed("fp8_param_gather"),
        Exposed("reuse_grad_buf_for_mxfp8_param_ag", help="Gather mxfp8 parameters in the gradient buffer."),
    ),
    module=__name__,
    doc="Settable fields of megatron.core's DistributedDataParallelConfig.",
)

CORE_SECTIONS = CoreSections(transformer=TransformerSettings, optimizer=OptimizerSettings, ddp=DdpSettings)
