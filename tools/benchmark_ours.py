"""Our side of `tools/benchmark.py`: the trainer of `pretrain_let.py`, asked for a few steps at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_reference import GptShape, weights_of_megatron
from benchmark_sides import StepTime, time_steps

from megatron_let.config.derive import resolve
from megatron_let.mcore.parallel import parallel_context
from megatron_let.mcore.transformer_config import uses_transformer_engine
from megatron_let.planning.flops import training_flops_per_token
from megatron_let.regular_files import read_text
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.evaluation import evaluate
from megatron_let.training.metrics import METRICS_FILE
from megatron_let.training.signals import StopRequest
from megatron_let.training.trainer import Trainer


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

    def layers(self) -> str:
        """Return which layers the student has."""
        run = self._trainer.run
        is_te = uses_transformer_engine(run.config, is_on_gpu=run.context.is_on_gpu)
        return "Transformer Engine" if is_te else "stock"

    def flops_per_token(self) -> float:
        """Return forward + backward FLOPs of one token of the student."""
        run = self._trainer.run
        (gpt,) = run.parts.student.gpt_chunks
        return training_flops_per_token(run.config, gpt.vocab_size)

    def teacher_weights(self) -> list[torch.Tensor]:
        """Return the weights of the teacher, which the run still has."""
        alignment = self._trainer.run.alignment
        assert alignment is not None, "a run with LET"
        assert alignment.teacher is not None, "before S_stop"
        return list(alignment.teacher.parameters())

    def first_loss(self) -> float:
        """Return the mean loss over the first global batch, from the weights as they are."""
        run = self._trainer.run
        validation = replace(run.config.validation, eval_iters=1)
        config = replace(run.config, validation=validation)
        return evaluate(config, run.context, run.parts.student, run.forward_step, run.data.train)

    def losses(self) -> list[float]:
        """Return the logged losses: means over the logging intervals."""
        path = Path(str(self._trainer.run.config.checkpoint.save), METRICS_FILE)
        return [json.loads(line)["lm_loss"] for line in read_text(path).splitlines()]

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
    config = resolve(parse_arguments(list(argv)), int(os.environ.get("WORLD_SIZE", "1")))
    with parallel_context(config) as context:
        yield OurRun(build_trainer(config, context, StopRequest()))


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
