"""What a job holds while it trains, measured on its own ranks: by its tensors, and by the system's count of its memory."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_let.config.derive import resolve
from megatron_let.mcore.meta_rank import RankSizes, gradient_buffers, sizes_of_rank
from megatron_let.mcore.parallel import parallel_context
from megatron_let.planning.tracing import Tracer
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.signals import StopRequest
from megatron_let.training.trainer import Trainer


class Held(NamedTuple):
    """What a rank held in its second iteration."""

    sizes: RankSizes
    optimizer: int
    """Bytes of main weights and moments, as the optimizer has them after a step."""

    working: int
    """Peak in bytes of all tensors but weights, gradients, optimizer state and teacher."""


def held_by_tensors(argv: Sequence[str]) -> Held:
    """Train two iterations on this rank and count the tensors of the second."""
    with _trainer_after_one_step(argv) as (trainer, iterators, tp_size):
        student, optimizer = trainer.run.parts.student, trainer.run.parts.optimizer
        assert optimizer is not None
        weights = [parameter for chunk in student.chunks for parameter in chunk.parameters()]
        state = _optimizer_tensors(optimizer)
        alignment = trainer.run.alignment
        teacher = [] if alignment is None or alignment.teacher is None else alignment.teacher.parameters()
        with Tracer("cpu") as tracer:
            for tensor in (*weights, *gradient_buffers(student), *state, *teacher):
                tracer.see(tensor, is_counted=False)
            trainer.step(iterators)
        own = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in state}
        for parameter in weights:
            own.pop(parameter.untyped_storage()._cdata, None)
        return Held(sizes_of_rank(student, optimizer, tp_size), sum(own.values()), tracer.peak_bytes)


def held_by_process(argv: Sequence[str]) -> int:
    """Train two iterations on this rank; return by how many bytes its memory rose to the peak of the second (Linux)."""
    before = _resident("VmRSS")
    with _trainer_after_one_step(argv) as (trainer, iterators, _):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        trainer.step(iterators)
        return _resident("VmHWM") - before


@contextmanager
def _trainer_after_one_step(argv: Sequence[str]) -> Iterator[tuple[Trainer, list[Any], int]]:
    config = resolve(parse_arguments(list(argv)), int(os.environ.get("WORLD_SIZE", "1")))
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        iterators = trainer.open_data()
        trainer.step(iterators)
        yield trainer, iterators, context.tp_size


def _optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Return what Megatron's optimizer steps and what it keeps of each; Adam's count of steps is no memory to speak of."""
    found: list[torch.Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        found += [parameter for group in part.param_groups for parameter in group["params"]]
        for state in part.optimizer.state.values():
            found += [
                value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0
            ]
    return found


def _resident(field: str) -> int:
    """Return a figure of this process's memory in bytes, once what is free is given back."""
    if field == "VmRSS":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024
