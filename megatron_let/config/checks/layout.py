"""Rules on how ranks, layers and sequences are divided."""

from __future__ import annotations

from megatron_let.config.batches import (
    batch_plan,
    layers_of_chunks,
    model_parallel_size,
    pipeline_units,
    virtual_pipeline_size,
)
from megatron_let.config.checks.rules import given, require, require_divisible, require_takes_effect
from megatron_let.config.run_config import RunConfig


def check_world_size(config: RunConfig, world_size: int) -> None:
    """The ranks must be whole replicas."""
    sizes, replica = config.transformer, model_parallel_size(config)
    require(
        world_size % replica == 0,
        f"{world_size} ranks cannot hold whole replicas of tensor {sizes.tensor_model_parallel_size} x pipeline "
        f"{sizes.pipeline_model_parallel_size} x context {sizes.context_parallel_size} = {replica} ranks; start a "
        f"multiple of {replica} or change the sizes",
    )


def check_tensor_parallel(config: RunConfig) -> None:
    """What tensor-parallel ranks share out must divide."""
    model, transformer = config.model, config.transformer
    tensor, context = transformer.tensor_model_parallel_size, transformer.context_parallel_size
    name = "--tensor-model-parallel-size"
    hint = "change one of them"
    require_divisible(transformer.num_attention_heads, tensor, "--num-attention-heads", name, hint)
    require_divisible(transformer.ffn_hidden_size, tensor, "--ffn-hidden-size", name, hint)
    groups = transformer.num_query_groups
    require(
        groups % tensor == 0 or tensor % groups == 0,
        f"--num-query-groups {groups} is neither a multiple nor a divisor of {name} {tensor}; change one of them",
    )
    if transformer.sequence_parallel:
        what = "--seq-length" if context == 1 else "--seq-length / --context-parallel-size ="
        require_divisible(model.seq_length // context, tensor, what, name, "sequence parallel splits it")


def check_context_parallel(config: RunConfig) -> None:
    """Each context-parallel rank takes two chunks of the sequence, for even work under a causal mask."""
    transformer = config.transformer
    context = transformer.context_parallel_size
    if context == 1:
        require_takes_effect(transformer, "cp_comm_type", needs="--context-parallel-size of 2 or more")
        return
    require(
        not config.data.reset_attention_mask,
        f"--reset-attention-mask cannot be used with --context-parallel-size {context}; leave one out",
    )
    hint = "each rank takes two chunks"
    require_divisible(
        config.model.seq_length, 2 * context, "--seq-length", "2 x --context-parallel-size =", hint
    )
    if transformer.cp_comm_type == "a2a":
        heads = min(transformer.num_attention_heads, transformer.num_query_groups)
        ranks = transformer.tensor_model_parallel_size * context
        hint = "--cp-comm-type a2a gives each rank whole heads"
        require_divisible(heads, ranks, "the number of key/value heads", "tensor x context size =", hint)


def check_pipeline(config: RunConfig) -> None:
    """Layers must fill the pipeline stages, and stages the model chunks."""
    transformer, parallel = config.transformer, config.parallel
    stages = transformer.pipeline_model_parallel_size
    ends = given(transformer, "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    counted = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
    if stages == 1:
        needs = "--pipeline-model-parallel-size of 2 or more"
        require_takes_effect(
            transformer,
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            needs=needs,
        )
        require_takes_effect(transformer, *counted, needs=needs)
        virtual = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
        require_takes_effect(parallel, *virtual, needs=needs)
        return
    if ends:
        require(
            not given(transformer, *counted),
            f"{' '.join(ends)} and {' '.join(given(transformer, *counted))} both say how layers are dealt; leave one out",
        )
        _check_uneven_stages(config, stages)
    else:
        what = (
            "--num-layers" if not given(transformer, *counted) else "layers with embedding and loss counted"
        )
        hint = "change one, or give --decoder-first-pipeline-num-layers / --decoder-last-pipeline-num-layers"
        require_divisible(pipeline_units(config), stages, what, "--pipeline-model-parallel-size", hint)
    _check_interleaved(config, stages)


def _check_uneven_stages(config: RunConfig, stages: int) -> None:
    """First and last stage have their own numbers; the rest is shared evenly by the stages between."""
    transformer = config.transformer
    named = [
        number
        for number in (
            transformer.num_layers_in_first_pipeline_stage,
            transformer.num_layers_in_last_pipeline_stage,
        )
        if number is not None
    ]
    rest, between = transformer.num_layers - sum(named), stages - len(named)
    fits = rest == 0 if between == 0 else rest > 0 and rest % between == 0
    require(
        fits,
        f"{transformer.num_layers} layers less {' and '.join(map(str, named))} named ones leave {rest} for "
        f"{between} pipeline stages, which cannot share them evenly; change the numbers",
    )


def _check_interleaved(config: RunConfig, stages: int) -> None:
    """The interleaved schedule's own rules."""
    transformer, parallel = config.transformer, config.parallel
    chunks, per_chunk = (
        parallel.num_virtual_stages_per_pipeline_rank,
        parallel.num_layers_per_virtual_pipeline_stage,
    )
    both = "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage"
    require(chunks is None or per_chunk is None, f"{both} say the same thing; leave one out")
    first, last = (
        transformer.num_layers_in_first_pipeline_stage,
        transformer.num_layers_in_last_pipeline_stage,
    )
    uneven = first is not None or last is not None
    if per_chunk is not None:
        require(
            not uneven,
            "--num-layers-per-virtual-pipeline-stage needs even stages; with --decoder-first/last-pipeline-num-layers "
            "use --num-virtual-stages-per-pipeline-rank",
        )
        on_stage = pipeline_units(config) // stages
        hint = "change one of them"
        require_divisible(
            on_stage, per_chunk, "layers of a stage", "--num-layers-per-virtual-pipeline-stage", hint
        )
    if chunks is not None:
        sizes = [size for size in (first, last) if size is not None]
        between = stages - len(sizes)
        require(
            between > 0 or chunks == 1,
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers of two interleaved stages say the "
            "same thing; leave one out",
        )
        if between:
            sizes.append((pipeline_units(config) - sum(sizes)) // between)
        for size in sizes:
            hint = "change one of them"
            require_divisible(
                size, chunks, "layers of a stage", "--num-virtual-stages-per-pipeline-rank", hint
            )
    if virtual_pipeline_size(config) is None:
        schedule_only = ("overlap_p2p_comm_warmup_flush", "microbatch_group_size_per_vp_stage")
        require_takes_effect(
            transformer, *schedule_only, needs="--num-virtual-stages-per-pipeline-rank of 2 or more"
        )


def check_recompute_units(config: RunConfig) -> None:
    """Uniform recompute goes through a model chunk in whole units."""
    transformer = config.transformer
    unit = transformer.recompute_num_layers
    if transformer.recompute_granularity != "full" or transformer.recompute_method != "uniform":
        return
    sizes = sorted(set(layers_of_chunks(config)))
    whole = [number for number in range(1, max(sizes) + 1) if not any(size % number for size in sizes)]
    require(
        unit in whole,
        f"--recompute-method uniform recomputes whole units of --recompute-num-layers {unit} layers, and the model chunks "
        f"have {', '.join(map(str, sizes))}; give {', '.join(map(str, whole))}, or --recompute-method block",
    )


def check_interleaved_microbatches(config: RunConfig, world_size: int) -> None:
    """The interleaved schedule takes microbatches in groups of at least the number of stages."""
    stages = config.transformer.pipeline_model_parallel_size
    if virtual_pipeline_size(config) is None:
        return
    group = config.transformer.microbatch_group_size_per_vp_stage or stages
    plan = batch_plan(config, world_size)
    name = "--microbatch-group-size-per-virtual-pipeline-stage"
    require(group >= stages, f"{name} is {stages} (the pipeline stages) or more, got {group}")
    for size in plan.sizes():
        microbatches = size // (plan.micro_batch_size * plan.data_parallel_size)
        left_over = microbatches % group
        require(
            microbatches >= group and (left_over == 0 or left_over >= stages),
            f"a global batch of {size} is {microbatches} microbatches, which do not fill groups of {group}, as the "
            f"interleaved schedule takes them; choose --global-batch-size (and START and INCREMENT of a ramp-up) so that "
            f"micro batch x data-parallel size goes in a multiple of {group} times",
        )


def check_data_parallel(config: RunConfig) -> None:
    """Flags of gradient reduction and of the distributed optimizer."""
    ddp, distributed = config.ddp, config.optimizer.use_distributed_optimizer
    if not ddp.overlap_grad_reduce:
        require_takes_effect(ddp, "bucket_size", needs="--overlap-grad-reduce")
    if not distributed:
        only = (
            "overlap_param_gather",
            "pad_buckets_for_high_nccl_busbw",
            "reduce_scatter_with_fp32_accumulation",
        )
        require_takes_effect(ddp, *only, needs="--use-distributed-optimizer")
    require(
        ddp.overlap_grad_reduce or not ddp.overlap_param_gather,
        "--overlap-param-gather needs --overlap-grad-reduce; add it or leave the flag out",
    )
    require(
        not (ddp.reduce_scatter_with_fp32_accumulation and ddp.grad_reduce_in_fp32),
        "--ddp-reduce-scatter-with-fp32-accumulation cannot take effect: gradients are already reduced in fp32; add "
        "--grad-reduce-in-bf16 or leave it out",
    )
