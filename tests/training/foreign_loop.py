"""Two runs of the same settings on one rank: this project's trainer, and the stand-in of Megatron-LM with the plugin."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from megatron.core import num_microbatches_calculator as calculator

from megatron_let.config.batches import padded_vocab_size
from megatron_let.config.derive import resolve
from megatron_let.mcore.model import Student, build_gpt, mask_padded_logits
from megatron_let.mcore.optimizer import build_lr_scheduler, build_optimizer
from megatron_let.mcore.parallel import parallel_context
from megatron_let.mcore.transformer_config import build_transformer_config
from megatron_let.testing.one_iteration import Tensors, whole_tensors
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.metrics import TrainingRow
from megatron_let.training.signals import StopRequest
from tests.training import megatron_lm_stand_in as stand_in

ITERATIONS, STOP, GLOBAL_BATCH, EOD, PADDING = 3, 2, 4, 60, 24
EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass
class Course:
    """What a run went through on one rank: gradients of each iteration, whole, and the weights at its end."""

    gradients: list[Tensors] = field(default_factory=list)
    weights: Tensors = field(default_factory=dict)
    numbers: list[tuple[float, float, float]] = field(default_factory=list)  # LET's loss, cosine and weight
    written: list[tuple[str, float, int]] = field(default_factory=list)  # to Megatron-LM's TensorBoard
    num_hooks: list[int] = field(default_factory=list)  # on the layers of this rank, after each iteration


@dataclass(frozen=True)
class Samples:
    """What both loops read, in order."""

    tokens: torch.Tensor  # [samples, s]
    labels: torch.Tensor


class Rows:
    """A sink that keeps LET's numbers."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def write(self, row: Any) -> None:
        if isinstance(row, TrainingRow) and row.let_loss is not None:
            self.course.numbers.append((row.let_loss, row.let_cosine or 0.0, row.let_weight or 0.0))

    def close(self) -> None:
        """Nothing to let go of."""


def settings_of(argv: Sequence[str]) -> Any:
    return resolve(parse_arguments(list(argv)), int(os.environ["WORLD_SIZE"]))


def watch_steps(course: Course, student: Student, optimizer: Any, context: Any) -> None:
    """Note the gradients whenever the optimizer is told to step."""
    step = optimizer.step

    def note_and_step() -> Any:
        course.gradients.append(whole_tensors(student, context, lambda parameter: parameter.main_grad))
        layers = [layer for chunk in student.gpt_chunks for layer in chunk.decoder.layers]
        course.num_hooks.append(sum(len(layer._forward_hooks) for layer in layers))
        return step()

    optimizer.step = note_and_step


def our_course(argv: Sequence[str]) -> tuple[Course, Samples]:
    """Run this project's trainer on this rank."""
    course, config = Course(), settings_of(argv)
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        run = trainer.run
        watch_steps(course, run.parts.student, run.parts.optimizer, context)
        reporter = dataclasses.replace(run.reporter, sinks=(*run.reporter.sinks, Rows(course)))
        trainer.run = dataclasses.replace(run, reporter=reporter)
        samples = [run.data.train[index] for index in range(ITERATIONS * GLOBAL_BATCH)]
        trainer.fit()
        course.weights = whole_tensors(run.parts.student, context, lambda parameter: parameter.data)
    return course, Samples(
        *(torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels"))
    )


@dataclass(frozen=True)
class Iterators:
    """The stand-in's data sets: an iterator on the ranks that ask for one."""

    samples: Samples
    context: Any
    micro_batch_size: int
    plugin: Any

    def __call__(self, vp_stage: int | None = None) -> Iterator[dict[str, torch.Tensor]] | None:
        plugin_reads = self.plugin.reads_data(vp_stage) and self.context.tp_rank == 0
        if not (stand_in.is_dataset_built_on_rank(vp_stage) or plugin_reads):
            return None
        return self._microbatches()

    def _microbatches(self) -> Iterator[dict[str, torch.Tensor]]:
        context, size = self.context, self.micro_batch_size
        first, stride = context.dp_rank * size, context.dp_size * size
        for start in range(first, len(self.samples.tokens), stride):
            tokens, labels = (x[start : start + size] for x in (self.samples.tokens, self.samples.labels))
            yield {
                "tokens": tokens,
                "labels": labels,
                "loss_mask": (tokens != EOD).float(),
                "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
            }


def plugin_module() -> Any:
    """Import the example as Megatron-LM's user does, the stand-in in Megatron-LM's place."""
    package = ModuleType("megatron.training")
    package.get_args = stand_in.get_args  # type: ignore[attr-defined]
    package.get_tokenizer = stand_in.get_tokenizer  # type: ignore[attr-defined]
    package.get_tensorboard_writer = stand_in.get_tensorboard_writer  # type: ignore[attr-defined]
    package.get_wandb_writer = stand_in.get_wandb_writer  # type: ignore[attr-defined]
    sys.modules["megatron.training"] = package
    sys.path.insert(0, str(EXAMPLES))
    try:
        import megatron_lm_plugin
    finally:
        sys.path.remove(str(EXAMPLES))
        del sys.modules["megatron.training"]
    return megatron_lm_plugin


@dataclass(frozen=True)
class Host:
    """What pretrain_gpt.py brings: a model provider, and here the optimizer too, with this run's settings."""

    config: Any
    core_config: Any
    context: Any
    course: Course

    def model_provider(
        self, pre_process: bool, post_process: bool, vp_stage: int | None = None, **_: Any
    ) -> Any:
        tp_size = self.context.tp_size
        model = build_gpt(
            self.config,
            self.core_config,
            padded_vocab_size=padded_vocab_size(EOD + 1, PADDING, tp_size),
            groups=self.context.groups,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            has_te_layers=False,
        )
        mask_padded_logits(model, EOD + 1, tp_rank=self.context.tp_rank)
        return model

    def setup_optimizer(self, model: list[Any]) -> tuple[Any, Any]:
        student = Student(model, self.core_config)
        optimizer = build_optimizer(self.config, student)
        watch_steps(self.course, student, optimizer, self.context)
        return optimizer, build_lr_scheduler(self.config, optimizer)

    def arguments(self, start: int) -> dict[str, Any]:
        """Return what Megatron-LM's get_args() gives."""
        transformer, training = self.config.transformer, self.config.training
        return {
            "iteration": start,
            "train_iters": ITERATIONS,
            "global_batch_size": training.global_batch_size,
            "micro_batch_size": training.micro_batch_size,
            "seq_length": self.config.model.seq_length,
            "num_layers": transformer.num_layers,
            "fp16": transformer.fp16,
            "bf16": transformer.bf16,
            "params_dtype": self.core_config.params_dtype,
            "log_interval": 1,
            "reset_attention_mask": False,
            "vocab_size": EOD + 1,
            "pipeline_model_parallel_size": transformer.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": transformer.virtual_pipeline_model_parallel_size,
        }

    def words(self) -> list[str]:
        """Return LET's flags."""
        let = self.config.let
        return [
            *("--let-teacher-load", str(let.let_teacher_load)),
            *("--let-weight", str(let.let_weight), "--let-stop-iters", str(let.let_stop_iters)),
            *("--let-student-layer", str(let.let_student_layer)),
        ]


@contextlib.contextmanager
def microbatch_calculator(config: Any, context: Any) -> Iterator[None]:
    """Set up what get_num_microbatches() asks."""
    sizes = config.training.global_batch_size, config.training.micro_batch_size, context.dp_size
    calculator.init_num_microbatches_calculator(context.rank, None, *sizes)
    try:
        yield
    finally:
        calculator.destroy_num_microbatches_calculator()


def host_course(argv: Sequence[str], samples: Samples, *, start: int = 0, log_interval: int = 1) -> Course:
    """Run the stand-in's loop with the example plugin on this rank, on the same settings and samples."""
    config, course = settings_of(argv), Course()
    with parallel_context(config) as context, contextlib.redirect_stdout(io.StringIO()) as printed:
        host = Host(config, build_transformer_config(config, is_on_gpu=False), context, course)
        module = plugin_module()
        plugin = module.LetPlugin()
        stand_in.WRITERS[:] = [SimpleNamespace(add_scalar=lambda *scalar: course.written.append(scalar))]
        with microbatch_calculator(config, context):
            model = stand_in.pretrain(
                Iterators(samples, context, config.training.micro_batch_size, plugin),
                plugin.model_provider(host.model_provider),
                stand_in.MODEL_TYPE,
                plugin.forward_step(stand_in.forward_step),
                extra_args_provider=module.add_let_arguments,
                args_defaults={**host.arguments(start), "log_interval": log_interval},
                words=host.words(),
                setup_optimizer=host.setup_optimizer,
            )
            plugin.finish()
        course.weights = whole_tensors(Student(model, host.core_config), context, lambda weight: weight.data)
    course.numbers = [
        (float(loss), float(cosine), float(weight))
        for loss, cosine, weight in re.findall(
            r"let loss: (\S+) \| let cosine: (\S+) \| let weight: (\S+) \|", printed.getvalue()
        )
    ]
    return course


def both(argv: Sequence[str]) -> tuple[Course, Course]:
    """Run both loops on this rank, from the same seed."""
    ours, samples = our_course(argv)
    return ours, host_course(argv, samples)
