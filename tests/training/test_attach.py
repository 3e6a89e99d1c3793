"""LET attached to a foreign loop with Megatron-LM's signatures: the bits of this project's own trainer."""

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
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import num_microbatches_calculator as calculator

from megatron_let.config.batches import padded_vocab_size
from megatron_let.config.derive import resolve
from megatron_let.errors import ConfigError
from megatron_let.let import AlignmentObjective, LetSchedule
from megatron_let.mcore.model import Student, build_gpt, mask_padded_logits
from megatron_let.mcore.optimizer import build_lr_scheduler, build_optimizer
from megatron_let.mcore.parallel import parallel_context
from megatron_let.mcore.transformer_config import build_transformer_config
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.one_iteration import Tensors, whole_tensors
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.attach import AttachedLet, HostLoop, attach_let
from megatron_let.training.build import build_trainer
from megatron_let.training.metrics import TrainingRow
from megatron_let.training.signals import StopRequest
from tests.training import megatron_lm_stand_in as stand_in

ITERATIONS, STOP, GLOBAL_BATCH, EOD, PADDING = 3, 2, 4, 60, 24
EXAMPLES = Path(__file__).parents[2] / "examples"
TP2_SP = {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}
PP2 = {"--pipeline-model-parallel-size": 2}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one-process": (1, {}),
    "fp16": (1, {"--fp16": None, "--initial-loss-scale": 1024}),
    "per-token": (1, {"--calculate-per-token-loss": None}),
    "dp2": (2, {}),
    "tp2-sp": (2, TP2_SP),
    "pp2": (2, PP2),
    "pp2-last-stage": (2, {**PP2, "--let-student-layer": 4}),
    "pp2-vp2": (2, {**PP2, "--num-layers-per-virtual-pipeline-stage": 1, "--let-student-layer": 3}),
    "pp4-middle-stage": (4, {"--pipeline-model-parallel-size": 4}),
}


@dataclass
class Course:
    """What a run went through on one rank: gradients of each iteration, whole, and the weights at its end."""

    gradients: list[Tensors] = field(default_factory=list)
    weights: Tensors = field(default_factory=dict)
    numbers: list[tuple[float, float, float]] = field(default_factory=list)  # LET's loss, cosine and weight
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


def host_course(argv: Sequence[str], samples: Samples, *, start: int = 0) -> Course:
    """Run the stand-in's loop with the example plugin on this rank, on the same settings and samples."""
    config, course = settings_of(argv), Course()
    with parallel_context(config) as context, contextlib.redirect_stdout(io.StringIO()) as printed:
        host = Host(config, build_transformer_config(config, is_on_gpu=False), context, course)
        module = plugin_module()
        plugin = module.LetPlugin()
        with microbatch_calculator(config, context):
            model = stand_in.pretrain(
                Iterators(samples, context, config.training.micro_batch_size, plugin),
                plugin.model_provider(host.model_provider),
                stand_in.MODEL_TYPE,
                plugin.forward_step(stand_in.forward_step),
                extra_args_provider=module.add_let_arguments,
                args_defaults=host.arguments(start),
                words=host.words(),
                setup_optimizer=host.setup_optimizer,
            )
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


@pytest.fixture(scope="module")
def base(token_files: Path, teacher: Path) -> dict[str, Any]:
    """Return the flags of a run with LET that ends before the run does."""
    return {
        **TINY_STUDENT,
        "--data-path": token_files,
        "--eod-mask-loss": None,
        "--global-batch-size": GLOBAL_BATCH,
        "--train-iters": ITERATIONS,
        "--lr-decay-style": "constant",
        "--make-vocab-size-divisible-by": PADDING,
        "--let-teacher-load": teacher,
        "--let-student-layer": 2,
        "--let-weight": 1.0,
        "--let-stop-iters": STOP,
    }


def different(left: Tensors, right: Tensors) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_loop_computes_the_bits_of_our_own(case: str, pool: RankPool, base: dict[str, Any]) -> None:
    world_size, changes = CASES[case]
    ranks = pool.run(world_size, both, arguments(base, changes))
    ours, host = ranks[0]
    assert len(ours.gradients) == len(host.gradients) == ITERATIONS
    for expected, actual in zip(ours.gradients, host.gradients, strict=True):
        assert different(expected, actual) == []
    assert different(ours.weights, host.weights) == []
    for expected_hooks, actual_hooks in ((o.num_hooks, h.num_hooks) for o, h in ranks):
        assert actual_hooks == expected_hooks
    assert sum(host.num_hooks[-1] for _, host in ranks) == sum(host.num_hooks[0] for _, host in ranks) - (
        world_size if "--pipeline-model-parallel-size" not in changes else 1
    )
    reports = [numbers for _, host in ranks for numbers in host.numbers]
    assert len(reports) == STOP, "one rank speaks, once an iteration"
    for report, row in zip(reports, ours.numbers, strict=True):
        assert report == pytest.approx(row, rel=1e-5, abs=1e-6)  # as many digits are printed


def resumed_after_stop(argv: Sequence[str]) -> list[int]:
    """Run the stand-in from S_stop on."""
    samples = Samples(*(torch.randint(EOD, (GLOBAL_BATCH, 32)) for _ in range(2)))
    return host_course(argv, samples, start=STOP).num_hooks


def test_a_run_resumed_after_s_stop_needs_no_teacher(
    pool: RankPool, base: dict[str, Any], tmp_path: Path
) -> None:
    words = arguments(base, {"--let-teacher-load": tmp_path / "gone"})
    assert pool.run(1, resumed_after_stop, words) == [[0]]


def resumed_before_stop(argv: Sequence[str]) -> str:
    """Run the stand-in with a teacher that is needed and is gone."""
    samples = Samples(*(torch.randint(EOD, (GLOBAL_BATCH, 32)) for _ in range(2)))
    try:
        host_course(argv, samples, start=STOP - 1)
    except ConfigError as error:
        return str(error)
    return "trained"


def test_a_run_resumed_before_s_stop_says_that_the_teacher_is_gone(
    pool: RankPool, base: dict[str, Any], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    message = pool.run(1, resumed_before_stop, arguments(base, {"--let-teacher-load": gone}))[0]
    assert str(gone) in message


def refusals(argv: Sequence[str]) -> dict[str, str]:
    """Attach LET to what it is not for; return what it says."""
    config, messages = settings_of(argv), {}
    with parallel_context(config) as context:
        core_config = build_transformer_config(config, is_on_gpu=False)
        gpt = build_gpt(
            config,
            core_config,
            padded_vocab_size=72,
            groups=context.groups,
            pre_process=True,
            post_process=True,
            vp_stage=None,
            has_te_layers=False,
        )
        loop = HostLoop(iteration=lambda: 0, num_microbatches=lambda: 1)

        def attach(name: str, model: list[Any], layer: int) -> None:
            objective = AlignmentObjective(LetSchedule(1.0, STOP), layer)
            try:
                attach_let(model, loop, load_teacher=no_teacher, objective=objective)
            except ConfigError as error:
                messages[name] = str(error)

        attach("no GPT", [torch.nn.Linear(2, 2)], 1)
        attach("no chunk", [], 1)
        attach("layer", [gpt], 5)
        core_config.context_parallel_size = 2
        attach("context parallel", [gpt], 1)
    return messages


def no_teacher(device: torch.device) -> Any:
    raise AssertionError("refused before a teacher is loaded")


def test_what_it_is_not_for_is_refused(pool: RankPool, base: dict[str, Any]) -> None:
    messages = pool.run(1, refusals, arguments(base))[0]
    assert messages == {
        "no GPT": "a model chunk is a Linear; LET knows megatron-core's GPTModel in its own DistributedDataParallel",
        "no chunk": "there is no model chunk on this rank",
        "layer": "LET: student layer 5 of a model with layers 1 to 4",
        "context parallel": "LET is not attached to context-parallel runs of other programs; use pretrain_let.py",
    }


def test_a_stage_without_data_and_a_sample_without_mask_are_named() -> None:
    with pytest.raises(ConfigError, match="has no data; build the data set there too"):
        AttachedLet._next_sample(None)
    with pytest.raises(ConfigError, match="gives labels, tokens and no loss_mask"):
        AttachedLet._next_sample(iter([{"tokens": torch.zeros(1, 2), "labels": torch.zeros(1, 2)}]))


def test_the_teacher_pulls_in_what_is_compared(pool: RankPool, base: dict[str, Any]) -> None:
    """Without the teacher's pull the gradients differ, so that the comparison above shows something."""
    plain = {flag: False for flag in base if flag.startswith("--let-")}
    with_let = pool.run(1, our_course, arguments(base))[0][0]
    without = pool.run(1, our_course, arguments(base, plain))[0][0]
    assert different(with_let.gradients[0], without.gradients[0]) != []
