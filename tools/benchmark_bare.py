"""The other side of `tools/benchmark.py train`: the loop of benchmark_reference.py, asked for a few steps at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark_reference import BareLoop, GptShape, LoopSettings
from benchmark_sides import StepTime, time_steps


@dataclass(frozen=True)
class BareSettings:
    """The bare loop and where `OurRun.export` put what it starts from."""

    shape: GptShape
    loop: LoopSettings
    start: Path


class BareRun:
    """The bare loop, one step at a time."""

    def __init__(self, loop: BareLoop) -> None:
        self._loop = loop

    def steps(self, count: int) -> list[StepTime]:
        """Do `count` optimizer steps and return the time of each."""
        return time_steps(self._loop.step, count)

    def first_loss(self) -> float:
        """Return the mean loss over this rank's rows of the first global batch, from the weights as they are."""
        return self._loop.first_loss()

    def losses(self) -> list[float]:
        """Return the logged losses: this rank's means over the logging intervals."""
        return self._loop.losses()


@contextmanager
def bare_run(settings: BareSettings) -> Iterator[BareRun]:
    """Build the bare loop on this rank's rows of every global batch."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_on_gpu else torch.device("cpu")
    if is_on_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if is_on_gpu else "gloo")
    start = torch.load(settings.start, weights_only=True)
    tokens = start["tokens"].view(-1, world_size, settings.loop.micro_batch_size, start["tokens"].shape[1])
    try:
        yield BareRun(
            BareLoop(
                settings.shape,
                settings.loop,
                weights=start["weights"],
                tokens=tokens[:, rank].flatten(0, 1),
                device=device,
            )
        )
    finally:
        if world_size > 1:
            dist.destroy_process_group()
