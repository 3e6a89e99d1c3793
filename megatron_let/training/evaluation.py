"""Validation loss over a fixed set of samples, the same at every evaluation of a run and for every layout."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_let.config.run_config import RunConfig
from megatron_let.mcore.datasets import Sample, microbatches
from megatron_let.mcore.model import Student
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.schedule import run_schedule
from megatron_let.training.forward_step import LM_LOSS, ForwardStep


def evaluate(
    config: RunConfig,
    context: ParallelContext,
    student: Student,
    forward_step: ForwardStep,
    dataset: torch.utils.data.Dataset[Sample],
) -> float:
    """Return the mean language-model loss over the first `--eval-iters` global batches of `dataset`.

    No teacher runs. Every rank calls this and gets the value.
    """
    student.set_training(False)
    is_collecting = config.training.manual_gc and config.training.manual_gc_eval
    if is_collecting:
        gc.collect()
    num_microbatches = config.training.global_batch_size // (
        config.training.micro_batch_size * context.dp_size
    )
    iterators = data_iterators(config, context, student, forward_step, dataset, consumed_samples=0)
    total = torch.zeros(2, dtype=torch.float64, device=context.device)
    with torch.no_grad():
        for _ in range(config.validation.eval_iters):
            reports = run_schedule(
                config, student, forward_step, iterators, num_microbatches=num_microbatches, forward_only=True
            )
            for report in reports:
                total += report[LM_LOSS]
    student.set_training(True)
    if is_collecting:
        gc.collect(generation=0)  # what validation itself made
    return reduce_loss(total, context)


def reduce_loss(total: torch.Tensor, context: ParallelContext) -> float:
    """Return sum / count of [sum, count] added up over data-parallel ranks, known to every rank.

    Only the last pipeline stage brings numbers; its tensor-parallel ranks all bring the same ones.
    """
    brought = total if context.tp_rank == 0 else torch.zeros_like(total)
    dist.all_reduce(brought)
    loss_sum, count = brought.tolist()
    return loss_sum / count if count else float("nan")


def data_iterators(
    config: RunConfig,
    context: ParallelContext,
    student: Student,
    forward_step: ForwardStep,
    dataset: torch.utils.data.Dataset[Sample],
    *,
    consumed_samples: int,
) -> list[Iterator[Sample] | None]:
    """Return one iterator for each model chunk of this rank, None where the chunk needs no data."""
    return [
        microbatches(dataset, config, context, consumed_samples=consumed_samples)
        if forward_step.needs_data(chunk)
        else None
        for chunk in range(len(student.chunks))
    ]
