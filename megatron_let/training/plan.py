"""A run's plan: every pipeline stage traced on the meta device, and what follows for time, data and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from megatron_let.config.batches import (
    batch_plan,
    padded_vocab_size,
    train_iterations,
    virtual_pipeline_size,
)
from megatron_let.config.checks.let import ALLOWED_NOW
from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.config.validate import problems
from megatron_let.data.indexed import count_tokens
from megatron_let.errors import ConfigError, MissingFilesError, ProblemsError
from megatron_let.mcore.datasets import blend_weights, split_parts
from megatron_let.mcore.transformer_config import compute_dtype
from megatron_let.planning.flops import GPUS, Gpu, gpu_of, training_flops_per_token
from megatron_let.planning.pipeline import SHARES, Pipeline
from megatron_let.planning.plan import (
    DataPlan,
    PlanSettings,
    RunPlan,
    StagePlan,
    TeacherPlan,
    TimePlan,
    WorkPlan,
)
from megatron_let.training.data_needs import build_run_tokenizer, sample_counts
from megatron_let.training.let_record import stop_of_run, student_layer_of_run
from megatron_let.training.plan_split import ANYWHERE, better_split, traced_pipeline
from megatron_let.training.split_checks import usable_counts_alone
from megatron_let.training.stage_trace import TracedRun, TracedTeacher, teacher_vocab_size, trace_stage
from megatron_let.training.state import TrainingState
from megatron_let.training.teachers import teacher_dtype

DEFAULT_MFU = 0.4

# Share of a GPU's memory from which on a warning is due: what a plan leaves out takes the rest.
FULL = 0.9

MANY_EPOCHS = 40
GIB = 2**30

Value = TypeVar("Value")

NOT_PLANNED = (
    "the CUDA context, NCCL's buffers and the allocator's fragmentation; temporary memory inside kernels and of the "
    "optimizer's step; loading a checkpoint and evaluation",
    "messages between ranks and reading data: they are in the MFU; a resume: the plan is that of the whole run",
)


def make_plan(config: RunConfig, settings: PlanSettings) -> RunPlan:
    """Return what the run will cost.

    Raises:
        ConfigError: it could not start as it is; a ProblemsError holds all that is wrong.
    """
    vocab_size, gpu, warnings = _check(config, settings)
    config = resolve(config, settings.world_size, ANYWHERE)
    run = _traced_run(config, settings.world_size, vocab_size)
    num_stages = config.transformer.pipeline_model_parallel_size
    traces = [trace_stage(run, stage) for stage in range(num_stages)]
    stages = tuple(stage for stage, _ in traces)
    pipeline = traced_pipeline(run, stages)
    teacher = next(
        (_teacher_plan(run, owner, pipeline, traced) for owner, traced in traces if traced is not None), None
    )
    memory = gpu.memory if settings.gpu_memory_gib is None else settings.gpu_memory_gib
    room = FULL * memory * GIB if run.for_gpu else math.inf
    return RunPlan(
        world_size=settings.world_size,
        layout=_layout(config, settings.world_size),
        parameters=sum(stage.whole_parameters for stage in stages),
        padded_vocab_size=run.padded_vocab_size,
        for_gpu=run.for_gpu,
        stages=stages,
        teacher=teacher,
        work=_work_plan(run),
        time=_time_plan(run, teacher, gpu, settings) if run.for_gpu else None,
        data=_data_plan(config, settings.world_size, warnings),
        checkpoint_bytes=_checkpoint_bytes(config, stages),
        better_split=better_split(run, pipeline, stages, teacher, room=room),
        warnings=(*warnings, *_memory_warnings(stages, room), *_teacher_warnings(teacher)),
        not_planned=_not_planned(config, run),
    )


def _check(config: RunConfig, settings: PlanSettings) -> tuple[int, Gpu, list[str]]:
    """Return vocabulary, GPU and warnings, or raise ProblemsError with all that is wrong."""
    found: list[str] = []
    warnings: list[str] = []

    def attempt(action: Callable[[], Value]) -> Value | None:
        try:
            return action()
        except ConfigError as problem:
            found.append(str(problem))
        except OSError as problem:
            found.append(f"{problem.filename or 'a file'}: {problem.strerror or problem}")
        return None

    if settings.world_size < 1:
        raise ConfigError(f"--world-size {settings.world_size}: a run has at least one rank")
    found += [str(problem) for problem in problems(config, settings.world_size, ANYWHERE)]
    gpu = attempt(lambda: _gpu(settings))
    has_tokenizer = config.tokenizer.tokenizer_type is not None
    vocab_size = attempt(lambda: _vocab_size(config, warnings)) if has_tokenizer else None
    teacher_size = attempt(lambda: teacher_vocab_size(config)) if config.let.is_on else None
    if vocab_size is not None and teacher_size is not None and vocab_size > teacher_size:
        found.append(
            f"the student's token ids reach {vocab_size - 1} but the teacher knows ids up to {teacher_size - 1}; "
            "student and teacher must use the same tokenizer"
        )
    if found or vocab_size is None or gpu is None:
        raise ProblemsError(found)
    return vocab_size, gpu, warnings


def _vocab_size(config: RunConfig, warnings: list[str]) -> int:
    """Return the ids of the tokenizer; where its files are not here, those that --vocab-size states."""
    try:
        return build_run_tokenizer(config).vocab_size
    except MissingFilesError as problem:
        stated = config.model.vocab_size
        if stated is None:
            raise ConfigError(
                f"{problem}; with --vocab-size the plan does without the tokenizer"
            ) from problem
        warnings.append(f"planned with --vocab-size {stated} and no tokenizer: {problem}")
        return stated


def _traced_run(config: RunConfig, world_size: int, vocab_size: int) -> TracedRun:
    transformer = config.transformer
    plan = batch_plan(config, world_size)
    stages = transformer.pipeline_model_parallel_size
    # From here on every further microbatch finds what the one before it left.
    enough = 2 * stages + 2
    if virtual_pipeline_size(config) is not None:
        enough = 2 * (transformer.microbatch_group_size_per_vp_stage or stages)
    full = plan.full // (plan.micro_batch_size * plan.data_parallel_size)
    divisor, tensor = config.model.make_vocab_size_divisible_by, transformer.tensor_model_parallel_size
    return TracedRun(
        config=config,
        world_size=world_size,
        for_gpu=_is_for_gpu(config),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size(vocab_size, divisor, tensor),
        num_microbatches=min(full, enough),
    )


def _layout(config: RunConfig, world_size: int) -> dict[str, int]:
    transformer, plan = config.transformer, batch_plan(config, world_size)
    return {
        "tensor": transformer.tensor_model_parallel_size,
        "context": transformer.context_parallel_size,
        "pipeline": transformer.pipeline_model_parallel_size,
        "chunks a stage": virtual_pipeline_size(config) or 1,
        "data": plan.data_parallel_size,
        "micro batch": plan.micro_batch_size,
        "microbatches": plan.full // (plan.micro_batch_size * plan.data_parallel_size),
        "global batch": plan.full,
        "sequence": config.model.seq_length,
    }


def _teacher_plan(
    run: TracedRun, owner: StagePlan, pipeline: Pipeline, teacher: TracedTeacher
) -> TeacherPlan:
    config, layer = run.config, student_layer_of_run(run.config)
    tensor = config.transformer.tensor_model_parallel_size
    flops, share = owner.teacher_flops, config.let.let_share_teacher
    alone = pipeline.stages()
    costs = pipeline.stages(flops if share == "none" else flops / tensor, layer)
    return TeacherPlan(
        description=teacher.description,
        student_layer=layer,
        stage=owner.stage,
        stop_iteration=stop_of_run(config.let, train_iterations(config, run.world_size))[0],
        weights_bytes=teacher.weights,
        flops_per_token=teacher.flops_per_token,
        share_of_flops=teacher.flops_per_token / training_flops_per_token(config, run.padded_vocab_size),
        slowdown={
            share: pipeline.slowdown(flops, layer, share=share, tensor_size=tensor) for share in SHARES
        },
        share=share,
        allowed=ALLOWED_NOW["let_share_teacher"],
        is_on_slowest=len(alone) > 1 and alone[owner.stage] == max(alone),
        is_bottleneck=len(alone) > 1 and share != "tensor-pipeline" and costs[owner.stage] > max(alone),
    )


def _gpu(settings: PlanSettings) -> Gpu:
    """Return the GPU; what is said of its speed must be possible."""
    gpu = gpu_of(settings.gpu)
    if gpu is None:
        raise ConfigError(f"--gpu {settings.gpu} is none of {', '.join(GPUS)}; give one of them")
    if settings.mfu is not None and not 0 < settings.mfu <= 1:
        raise ConfigError(f"--mfu {settings.mfu} is a share of the peak: above 0 and at most 1")
    return gpu


def _work_plan(run: TracedRun) -> WorkPlan:
    config, plan = run.config, batch_plan(run.config, run.world_size)
    iterations, length = train_iterations(config, run.world_size), config.model.seq_length
    flops = training_flops_per_token(config, run.padded_vocab_size) * plan.full * length
    return WorkPlan(iterations, plan.samples_of_iterations(iterations) * length, flops)


def _time_plan(run: TracedRun, teacher: TeacherPlan | None, gpu: Gpu, settings: PlanSettings) -> TimePlan:
    plan, work = batch_plan(run.config, run.world_size), _work_plan(run)
    mfu = DEFAULT_MFU if settings.mfu is None else settings.mfu
    how = "stated" if settings.mfu is not None else "assumed: give a measured one"
    tflops = mfu * gpu.bf16_tflops
    seconds = work.flops_per_iteration / (run.world_size * tflops * 1e12)
    batch = plan.full * run.config.model.seq_length  # tokens
    guided, extra = None, 0.0
    if teacher is not None:
        guided = seconds * teacher.slowdown[teacher.share]
        tokens = plan.samples_of_iterations(teacher.stop_iteration) * run.config.model.seq_length
        extra = tokens / batch * (guided - seconds)
    return TimePlan(
        tflops_per_device=tflops,
        source=f"--mfu {mfu:g} {how}, of {settings.gpu}'s {gpu.bf16_tflops:g}",
        seconds_per_iteration=seconds,
        seconds_per_iteration_with_teacher=guided,
        days=(work.tokens / batch * seconds + extra) / 86_400,
    )


def _data_plan(config: RunConfig, world_size: int, warnings: list[str]) -> DataPlan:
    """Return what each split needs and has; what is missing or too small is a warning: the data may be elsewhere."""
    counts = sample_counts(config, train_iterations(config, world_size), TrainingState())
    length = config.model.seq_length
    needed = {
        "training": counts.train * length,
        "validation": counts.valid * length,
        "test": counts.test * length,
    }
    present: dict[str, int | None] = dict.fromkeys(needed)
    epochs: dict[str, float | None] = dict.fromkeys(needed)
    if not config.data.mock_data:
        try:
            for split, parts in split_parts(config).items():
                sizes = [count_tokens(*part) for part in parts]
                present[split] = sum(sizes)
                if sizes and all(sizes):
                    epochs[split] = _most_epochs(needed[split], sizes, blend_weights(config, split))
            usable_counts_alone(config, counts)
        except ConfigError as problem:
            warnings.append(f"data: {problem}")
    warnings += _repetition_warnings(epochs["training"])
    return DataPlan(needed, present, epochs, is_made_up=config.data.mock_data)


def _most_epochs(needed: int, sizes: Sequence[int], weights: Sequence[float] | None) -> float:
    """Return the largest number of epochs of a data set when `needed` tokens are read by weight, or by size."""
    shares = sizes if weights is None else weights
    return needed / sum(shares) * max(share / size for share, size in zip(shares, sizes, strict=True))


def _checkpoint_bytes(config: RunConfig, stages: Sequence[StagePlan]) -> int:
    """Return the size of a checkpoint: weights, and unless --no-save-optim the optimizer's main weights and moments."""
    parameters = sum(stage.whole_parameters for stage in stages)
    weight = compute_dtype(config).itemsize
    moments = 8 if config.optimizer.optimizer == "adam" else 4 * (config.optimizer.sgd_momentum != 0)
    has_main = weight < 4 or config.optimizer.use_distributed_optimizer
    per_parameter = weight + (0 if config.checkpoint.no_save_optim else moments + 4 * has_main)
    return parameters * per_parameter


def _memory_warnings(stages: Sequence[StagePlan], room: float) -> list[str]:
    limit = room / FULL / GIB
    return [
        f"stage {stage.stage} needs {stage.memory.before_stop / GIB:.1f} GiB of the {limit:g} GiB of a GPU, and what is not "
        "planned comes on top: more tensor or pipeline ranks, a smaller --micro-batch-size or --recompute-granularity full "
        "take less"
        for stage in stages
        if stage.memory.before_stop > room
    ]


def _teacher_warnings(teacher: TeacherPlan | None) -> list[str]:
    if teacher is None or not teacher.is_bottleneck:
        return []
    slowdown, planned = teacher.slowdown, "" if "tensor" in teacher.allowed else ", planned only"
    where = f"stage {teacher.stage}, which the teacher makes the slowest"
    if teacher.is_on_slowest:
        where = f"the slowest stage, {teacher.stage}, and the teacher slows it down"
    return [
        f"layer k = {teacher.student_layer} is on {where}: "
        f"{slowdown[teacher.share] - 1:+.0%} time an iteration until S_stop (work shared over the tensor-parallel ranks "
        f"{slowdown['tensor'] - 1:+.0%}{planned})"
    ]


def _repetition_warnings(epochs: float | None) -> list[str]:
    if epochs is None or epochs <= MANY_EPOCHS:
        return []
    return [
        f"a training data set is read {epochs:,.0f} times; beyond some {MANY_EPOCHS} repetitions teach next to nothing (arXiv "
        "2305.16264): give more data, another weight, or a shorter run"
    ]


def _not_planned(config: RunConfig, run: TracedRun) -> tuple[str, ...]:
    more = []
    if config.transformer.fp8 is not None:
        more.append("FP8: planned as bf16")
    if run.for_gpu and config.model.transformer_impl != "local":
        more.append("Transformer Engine's layers: planned with the stock ones, which keep nearly the same")
    if config.transformer.attention_dropout and not run.for_gpu:
        more.append("attention dropout on CPU, where PyTorch keeps the scores")
    if run.for_gpu and compute_dtype(config) is torch.float32:
        more.append("fp32's own speed: time is that of bf16's peak, which fp32 does not come near")
    elif run.for_gpu and config.let.is_on and teacher_dtype(config) is torch.float32:
        more.append(
            "the fp32 teacher's own speed: its time is that of bf16's peak, which fp32 does not come near"
        )
    if config.data.reset_attention_mask and config.let.is_on:
        more.append("documents: the teacher is planned on whole rows")
    return (*NOT_PLANNED, *more)


def _is_for_gpu(config: RunConfig) -> bool:
    """Return whether the run is one on GPUs: all are but those that ask for gloo."""
    return bool(config.parallel.distributed_backend != "gloo")
