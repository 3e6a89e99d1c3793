"""Run one training iteration on any layout and return what it computed, whole: losses, weights, gradients.

iterations = pool.run(4, run_one_iteration, ["--num-layers", "4", ...])
iterations[0].gradients["decoder.layers.2.mlp.linear_fc1.weight"]  # global layer 2 (0-based), not sharded
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_let.config.derive import resolve
from megatron_let.mcore.model import Student
from megatron_let.mcore.parallel import ParallelContext, parallel_context
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.metrics import Row, TrainingRow
from megatron_let.training.signals import StopRequest
from megatron_let.training.trainer import Trainer

Tensors = dict[str, torch.Tensor]

_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
# Rounding allowed between copies of a tensor that every rank must hold alike.
_SAME = 1e-6


@dataclass(frozen=True)
class OneIteration:
    """The first iteration of a run, before the optimizer changed anything. Tensors are whole and in fp32.

    Names are those of megatron-core's modules with global 0-based layer numbers. `gradients` are what the optimizer
    is given: reduced, divided, not clipped, and under fp16 still times the loss scale.
    """

    row: TrainingRow | None  # what was logged; on rank 0 alone
    weights: Tensors
    gradients: Tensors
    tokens: torch.Tensor  # [global batch, s], the samples in the order of the data set
    labels: torch.Tensor  # [global batch, s]


@dataclass
class _Rows:
    """A sink that keeps the rows."""

    rows: list[Row] = field(default_factory=list)

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        """Nothing to let go of."""


def run_one_iteration(argv: Sequence[str]) -> OneIteration:
    """Run the program with `--train-iters 1` on this rank and catch its first iteration; every rank calls this."""
    config = resolve(parse_arguments([*argv, "--train-iters", "1"]), int(os.environ.get("WORLD_SIZE", "1")))
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        samples = [trainer.run.data.train[i] for i in range(config.training.global_batch_size)]
        tokens, labels = (torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
        student = trainer.run.parts.student
        weights = whole_tensors(student, context, lambda parameter: parameter.data)
        rows, gradients = _Rows(), _catch_gradients(trainer)
        reporter = dataclasses.replace(trainer.run.reporter, sinks=(*trainer.run.reporter.sinks, rows))
        trainer.run = dataclasses.replace(trainer.run, reporter=reporter)
        trainer.fit()
    row = next((row for row in rows.rows if isinstance(row, TrainingRow)), None)
    return OneIteration(row, weights, gradients, tokens, labels)


def _catch_gradients(trainer: Trainer) -> Tensors:
    """Return a dict that is filled with the gradients when the optimizer is told to step."""
    caught: Tensors = {}
    run = trainer.run
    optimizer: Any = run.parts.optimizer
    step = optimizer.step

    def catch_and_step() -> Any:
        caught.update(whole_tensors(run.parts.student, run.context, lambda parameter: parameter.main_grad))
        return step()

    optimizer.step = catch_and_step
    return caught


@dataclass(frozen=True)
class _Piece:
    """One rank's part of a tensor."""

    tensor: torch.Tensor
    tp_rank: int
    split_dim: int | None  # None: every tensor-parallel rank holds all of it
    is_gated: bool  # the shard is [gate; up], each split by itself


def whole_tensors(
    student: Student, context: ParallelContext, tensor_of: Callable[[Any], torch.Tensor]
) -> Tensors:
    """Return `tensor_of` each parameter of the student, put together from all ranks; every rank calls this.

    Copies that must be alike (data-parallel ranks, unsplit tensors, the tied embedding of the first and the last
    pipeline stage) are compared: an AssertionError names one that is not. Not for gradients that the distributed
    optimizer leaves scattered.
    """
    mine: list[tuple[str, _Piece]] = []
    for chunk in student.gpt_chunks:
        is_tied = chunk.share_embeddings_and_output_weights
        for name, parameter in chunk.named_parameters():
            split_dim = parameter.partition_dim if parameter.tensor_model_parallel else None
            is_gated = chunk.config.gated_linear_unit and "linear_fc1" in name
            tensor = tensor_of(parameter).detach().float().clone()
            key = _EMBEDDING if is_tied and name == _HEAD else _global_name(chunk, name)
            mine.append((key, _Piece(tensor, context.tp_rank, split_dim, is_gated)))
    pieces: dict[str, list[_Piece]] = {}
    for from_rank in context.gather(mine):
        for name, piece in from_rank:
            pieces.setdefault(name, []).append(piece)
    return {name: _join(name, pieces[name], context.tp_size) for name in sorted(pieces)}


def _global_name(chunk: Any, name: str) -> str:
    """Return a parameter's name with its layer's number in the whole model."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    index, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{chunk.decoder.layers[int(index)].layer_number - 1}.{rest}"


def _join(name: str, pieces: Sequence[_Piece], tp_size: int) -> torch.Tensor:
    """Put one tensor together from all its pieces and copies."""
    shards: dict[int, torch.Tensor] = {}
    for piece in pieces:
        place = 0 if piece.split_dim is None else piece.tp_rank
        known = shards.setdefault(place, piece.tensor)
        difference = float((known - piece.tensor).abs().max())
        assert difference <= _SAME * float(known.abs().max()), f"copies of {name} differ by {difference}"
    first = pieces[0]
    if first.split_dim is None:
        return shards[0]
    parts = [shards[rank] for rank in range(tp_size)]
    if not first.is_gated:
        return torch.cat(parts, first.split_dim)
    halves = [part.chunk(2, dim=first.split_dim) for part in parts]
    return torch.cat([half[side] for side in (0, 1) for half in halves], first.split_dim)


def write_spread_checkpoint(
    argv: Sequence[str],
    directory: Path,
    *,
    spread: float = 0.1,
    rounded_to: torch.dtype = torch.float32,
) -> None:
    """Save a fresh student, one process, with noise on every weight, as iteration 0 of `directory`.

    Biases that start at 0 and norms that start at 1 show nothing when they are mixed up; after this they do. All weights
    are values that `rounded_to` has.
    """
    words = [*argv, "--train-iters", "1", "--save", str(directory), "--no-save-optim"]
    config = resolve(parse_arguments(words), 1)
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        random = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for chunk in trainer.run.parts.student.gpt_chunks:
                for parameter in chunk.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=random) * spread)
                    parameter.copy_(parameter.to(rounded_to))
        assert trainer.run.saver is not None, "--save is given"
        trainer.run.saver.begin(trainer.state)
        trainer.run.saver.wait()
        trainer.run.reporter.close()
