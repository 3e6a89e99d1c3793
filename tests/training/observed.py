"""What a run's settings came to and what it read, seen from inside its ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_let.config.derive import resolve
from megatron_let.mcore.layer_tap import find_layer
from megatron_let.mcore.parallel import parallel_context
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.signals import StopRequest
from megatron_let.training.trainer import Run


@dataclass(frozen=True)
class Effects:
    """What a rank's settings came to; the defaults are those of the tiny student on one process."""

    tp_pp_dp: tuple[int, int, int] = (1, 1, 1)
    num_chunks: int = 1
    is_sequence_parallel: bool = False
    recompute: tuple[str | None, str | None, int | None] = (None, None, None)  # granularity, method, layers
    is_optimizer_distributed: bool = False
    are_gradients_overlapped: bool = False  # their reduction with backward, in several buckets
    are_parameters_overlapped: bool = False  # their gather with the next forward
    rows: int = 32  # of layer k's output on this rank: [rows, b, h]
    passes: tuple[float, float] = (1.0, 1.0)  # forwards of layer k and of its attention for each microbatch


@dataclass
class _LayerK:
    """Counts what passes through layer k."""

    rows: int = 0
    layer_passes: int = 0
    attention_passes: int = 0

    def watch(self, layer: Any) -> None:
        layer.register_forward_hook(self._on_layer)
        layer.self_attention.core_attention.register_forward_hook(self._on_attention)

    def _on_layer(self, _: torch.nn.Module, __: Any, output: Any) -> None:
        self.rows = output[0].shape[0]
        self.layer_passes += 1

    def _on_attention(self, _: torch.nn.Module, __: Any, ___: Any) -> None:
        self.attention_passes += 1


def train_and_observe(argv: Sequence[str]) -> Effects | None:
    """Run the whole program on this rank; return what its settings came to, None away from layer k's stage."""
    config = resolve(parse_arguments(list(argv)), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        run, watched = trainer.run, _LayerK()
        assert run.alignment is not None
        owner = find_layer(run.parts.student.gpt_chunks, run.alignment.objective.student_layer)
        if owner is not None:
            watched.watch(owner[1])
        trainer.fit()
        return None if owner is None else _effects(run, watched)


def _effects(run: Run, watched: _LayerK) -> Effects:
    context, core, chunks = run.context, run.parts.student.core_config, run.parts.student.chunks
    optimizer: Any = run.parts.optimizer
    num_microbatches = run.total_iterations * run.batches.num_microbatches(0)
    return Effects(
        tp_pp_dp=(context.tp_size, context.pp_size, context.dp_size),
        num_chunks=len(chunks),
        is_sequence_parallel=core.sequence_parallel,
        recompute=(core.recompute_granularity, core.recompute_method, core.recompute_num_layers),
        is_optimizer_distributed=all(
            isinstance(part, DistributedOptimizer)
            for part in getattr(optimizer, "chained_optimizers", [optimizer])
        ),
        are_gradients_overlapped=core.no_sync_func is not None
        and all(chunk.ddp_config.overlap_grad_reduce and len(chunk.bucket_groups) > 1 for chunk in chunks),
        are_parameters_overlapped=all(
            chunk.ddp_config.overlap_param_gather and len(chunk.remove_forward_pre_hook_handles) > 1
            for chunk in chunks
        ),
        rows=watched.rows,
        passes=(watched.layer_passes / num_microbatches, watched.attention_passes / num_microbatches),
    )


def counted_tokens(argv: Sequence[str]) -> list[int]:
    """Return the counted tokens of each sample that a run with --eod-mask-loss reads, in its order."""
    config = resolve(parse_arguments(list(argv)), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        run = trainer.run
        num_samples = run.total_iterations * config.training.global_batch_size
        samples = [run.data.train[i]["tokens"] for i in range(num_samples)]
        run.reporter.close()
        return [int((tokens != run.forward_step.eod).sum()) for tokens in samples]
