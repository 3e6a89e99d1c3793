"""How the layers of a traced run are dealt to its pipeline stages, and a better deal that the program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_let.config.batches import batch_plan, train_iterations, virtual_pipeline_size
from megatron_let.config.checks.rules import Packages, given
from megatron_let.config.run_config import RunConfig
from megatron_let.config.validate import problems
from megatron_let.planning.pipeline import Pipeline
from megatron_let.planning.plan import BetterSplit, StagePlan, TeacherPlan
from megatron_let.training.stage_trace import TracedRun

# A plan is made where the run is not: its kernels need not be here.
ANYWHERE = Packages(transformer_engine=True, apex=True)

# A split is proposed when it saves more than this share of an iteration.
_WORTH_SAYING = 0.01

_COUNTED = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")
_FIRST, _LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
_PER_CHUNK = "num_layers_per_virtual_pipeline_stage"


def traced_pipeline(run: TracedRun, stages: Sequence[StagePlan]) -> Pipeline:
    """Return the pipeline with the costs that were traced; layers cost alike, the output layer its matrix product."""
    transformer, plan = run.config.transformer, batch_plan(run.config, run.world_size)
    tokens = plan.micro_batch_size * run.config.model.seq_length / transformer.context_parallel_size
    columns = run.padded_vocab_size / transformer.tensor_model_parallel_size
    head = 3 * 2 * tokens * transformer.hidden_size * columns
    first = next(stage for stage in stages if stage.layers)
    return Pipeline(
        layers=tuple(stage.layers for stage in stages),
        layer=(first.flops - (head if first.has_head else 0)) / len(first.layers),
        head=head,
        num_microbatches=plan.full // (plan.micro_batch_size * plan.data_parallel_size),
        num_chunks=virtual_pipeline_size(run.config) or 1,
    )


def better_split(
    run: TracedRun,
    pipeline: Pipeline,
    stages: Sequence[StagePlan],
    teacher: TeacherPlan | None,
    *,
    room: float,
) -> BetterSplit | None:
    """Return the split whose run takes least time, before and after S_stop together, if it is worth a word.

    It is one that the program takes, and whose stages stay within `room` bytes, or within what the present ones take.
    """
    if len(stages) == 1:
        return None
    tensor = run.config.transformer.tensor_model_parallel_size
    samples = batch_plan(run.config, run.world_size).samples_of_iterations

    def cost(split: Pipeline) -> float:
        plain = split.iteration(split.stages())
        if teacher is None:
            return plain
        flops = stages[teacher.stage].teacher_flops
        slowdown = split.slowdown(flops, teacher.student_layer, share=teacher.share, tensor_size=tensor)
        guided = samples(teacher.stop_iteration) / samples(train_iterations(run.config, run.world_size))
        return plain * (1 + guided * (slowdown - 1))

    room = max(room, _largest(pipeline, stages, teacher))
    for split in sorted(pipeline.other_splits(), key=cost):
        saved = 1 - cost(split) / cost(pipeline)
        if saved < _WORTH_SAYING:
            return None
        dealt, proposed = _proposal(run.config, split, saved)
        if _largest(split, stages, teacher) <= room and not any(problems(dealt, run.world_size, ANYWHERE)):
            return proposed
    return None


def _largest(split: Pipeline, stages: Sequence[StagePlan], teacher: TeacherPlan | None) -> float:
    """Return the peak in bytes of the fullest stage: one that gets more layers takes as much more for each as now."""
    most = max(stage.memory.after_stop / len(stage.layers) for stage in stages if stage.layers)
    peaks = []
    for stage, layers in zip(stages, split.layers, strict=True):
        each = stage.memory.after_stop / len(stage.layers) if stage.layers else most
        peaks.append(stage.memory.after_stop + max(0, len(layers) - len(stage.layers)) * each)
    if teacher is not None:
        memory = stages[teacher.stage].memory
        peaks[split.owner(teacher.student_layer)] += memory.before_stop - memory.after_stop
    return max(peaks)


def _proposal(config: RunConfig, split: Pipeline, saved: float) -> tuple[RunConfig, BetterSplit]:
    """Return the settings with this split, and what to say of it: other flags also say how layers are dealt.

    Of two stages the first is named alone: with both, megatron-core divides by the stages between.
    """
    counts = tuple(len(layers) for layers in split.layers)
    last = counts[-1] if len(counts) > 2 else None
    replaced = (*_COUNTED, *(() if last else (_LAST,)))
    dealing: dict[str, Any] = {_FIRST: counts[0], _LAST: last, **dict.fromkeys(_COUNTED, False)}
    flags = f"--decoder-first-pipeline-num-layers {counts[0]}"
    flags += f" --decoder-last-pipeline-num-layers {last}" if last else ""
    parallel, per_chunk = config.parallel, given(config.parallel, _PER_CHUNK)
    if per_chunk:
        chunks = split.num_chunks if split.num_chunks > 1 else None
        parallel = replace(
            parallel,
            num_layers_per_virtual_pipeline_stage=None,
            num_virtual_stages_per_pipeline_rank=chunks,
        )
        flags += f" --num-virtual-stages-per-pipeline-rank {chunks}" if chunks else ""
    dealt = replace(config, transformer=replace(config.transformer, **dealing), parallel=parallel)
    return dealt, BetterSplit(counts, flags, (*given(config.transformer, *replaced), *per_chunk), saved)
