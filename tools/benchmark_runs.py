"""What runs inside a side of `tools/benchmark.py`: our trainer, and the bare loop, behind the same few questions."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from benchmark_reference import BareLoop, GptShape, LoopSettings, weights_of_megatron
from benchmark_sides import StepTime

from megatron_let.config.derive import resolve
from megatron_let.data.indexed_writer import IndexedWriter
from megatron_let.mcore.parallel import parallel_context
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.evaluation import evaluate
from megatron_let.training.metrics import METRICS_FILE
from megatron_let.training.signals import StopRequest
from megatron_let.training.trainer import Trainer


def time_steps(step: Callable[[], None], count: int) -> list[StepTime]:
    """Call `step` `count` times; return what each took, the device's work included."""
    times = []
    for _ in range(count):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(StepTime(time.perf_counter() - wall, time.process_time() - processor))
    return times


class OurRun:
    """The trainer of `pretrain_let.py`, one step at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._iterators = trainer.open_data()

    def steps(self, count: int) -> list[StepTime]:
        """Do `count` iterations and return the time of each."""
        return time_steps(lambda: self._trainer.step(self._iterators), count)

    def peak_memory(self, count: int) -> int:
        """Return the peak in bytes over `count` iterations: resident memory, or what CUDA tensors took."""
        reset_peak_memory()
        self.steps(count)
        return read_peak_memory()

    def first_loss(self) -> float:
        """Return the mean loss over the first global batch, from the weights as they are."""
        run = self._trainer.run
        return evaluate(run.config, run.context, run.parts.student, run.forward_step, run.data.train)

    def losses(self) -> list[float]:
        """Return the logged losses: means over the logging intervals."""
        path = Path(str(self._trainer.run.config.checkpoint.save), METRICS_FILE)
        return [json.loads(line)["lm_loss"] for line in path.read_text(encoding="utf-8").splitlines()]

    def export(self, path: Path, shape: GptShape, num_samples: int) -> None:
        """Write the weights and the first samples [num_samples, s + 1] for the bare loop (rank 0 writes)."""
        run = self._trainer.run
        if run.context.rank != 0:
            return
        (gpt,) = run.parts.student.gpt_chunks
        state = {name: value for name, value in gpt.state_dict().items() if isinstance(value, torch.Tensor)}
        samples = [run.data.train[index] for index in range(num_samples)]
        tokens = torch.stack([torch.cat([sample["tokens"], sample["labels"][-1:]]) for sample in samples])
        torch.save({"weights": weights_of_megatron(state, shape), "tokens": tokens}, path)

    def fit(self) -> int:
        """Train to the end."""
        return self._trainer.fit()


@contextmanager
def our_run(argv: Sequence[str]) -> Iterator[OurRun]:
    """Build the trainer for a command line, as `pretrain_let.py` does."""
    config = resolve(parse_arguments(list(argv)), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context:
        yield OurRun(build_trainer(config, context, StopRequest()))


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
    start = torch.load(settings.start)
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


def write_random_tokens(prefix: Path, *, num_tokens: int, vocab_size: int) -> None:
    """Write PREFIX.bin and PREFIX.idx: random ids below the end of document, in documents of a thousand."""
    random = np.random.default_rng(1)
    length = 1000
    with IndexedWriter(str(prefix), "uint16") as writer:
        for _ in range(-(-num_tokens // length)):
            ids = random.integers(0, vocab_size - 1, length, dtype=np.uint16)
            writer.add_documents(
                ids.tobytes(), np.asarray([length], np.int32).tobytes(), np.ones(1, np.int32).tobytes()
            )
        writer.finish()


def reset_peak_memory() -> None:
    """Begin a new peak: of CUDA tensors, or of this process's resident memory (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def read_peak_memory() -> int:
    """Return the peak in bytes since `reset_peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
