"""Run one iteration's microbatches through megatron-core's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_let.config.run_config import RunConfig
from megatron_let.mcore.model import Student


def run_schedule(
    config: RunConfig,
    student: Student,
    forward_step: Callable[..., Any],
    iterators: Sequence[Iterator[Any] | None],
    *,
    num_microbatches: int,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Run forward (and backward) of `num_microbatches` and return one loss report each, on the last stage only.

    Gradients are reduced over data-parallel ranks when this returns.
    """
    is_single = len(student.chunks) == 1
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if is_single else list(iterators),
        model=student.chunks[0] if is_single else list(student.chunks),
        num_microbatches=num_microbatches,
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )
    return list(reports)
