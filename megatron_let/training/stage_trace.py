"""One rank of a pipeline stage, built by the program itself on the meta device and led through its own schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_let.config.batches import padded_vocab_size
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.let import AlignmentObjective, AlignmentSums, LetSchedule, Teacher, with_bos
from megatron_let.let.hf_files import read_config
from megatron_let.let.hf_teacher import empty_hf_teacher
from megatron_let.let.losses import cosine_alignment
from megatron_let.let.teacher import check_layer
from megatron_let.mcore.batch import Microbatch
from megatron_let.mcore.checkpoint import RUN, load_common
from megatron_let.mcore.datasets import Sample
from megatron_let.mcore.frozen_gpt import build_frozen_gpt
from megatron_let.mcore.layer_tap import find_layer
from megatron_let.mcore.meta_rank import (
    META,
    MetaContext,
    forget_rotary_angles,
    gradient_buffers,
    meta_rank,
    plain_layers,
    sizes_of_rank,
)
from megatron_let.mcore.model import Student, build_student
from megatron_let.mcore.optimizer import build_optimizer
from megatron_let.mcore.schedule import run_schedule
from megatron_let.planning.plan import StageMemory, StagePlan
from megatron_let.planning.tracing import Tracer, traced
from megatron_let.training.alignment import Alignment
from megatron_let.training.checkpoint_files import newest_iteration_directory
from megatron_let.training.forward_step import ForwardStep
from megatron_let.training.let_record import student_layer_of_run
from megatron_let.training.megatron_teacher import MegatronTeacher
from megatron_let.training.teacher_bos import teacher_bos
from megatron_let.training.teachers import teacher_dtype, teacher_format
from megatron_let.training.watchdog import Heartbeat

# Marks no token as the end of a document.
_NO_EOD = -1


@dataclass(frozen=True)
class TracedRun:
    """The run whose stages are traced."""

    config: RunConfig
    world_size: int
    for_gpu: bool
    vocab_size: int
    padded_vocab_size: int
    num_microbatches: int


@dataclass(frozen=True)
class TracedTeacher:
    """The teacher as the stage that owns layer k holds it."""

    description: str
    vocab_size: int
    weights: int
    """In bytes."""

    flops_per_token: float


@dataclass
class _Flight:
    """Microbatches between the teacher's forward and the backward of layer k."""

    now: int = 0
    most: int = 0

    def loss(self, hidden: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> AlignmentSums:
        """Return LET's loss; a microbatch has met its backward."""
        self.now -= 1
        return cosine_alignment(hidden, states, mask)


def trace_stage(run: TracedRun, stage: int) -> tuple[StagePlan, TracedTeacher | None]:
    """Build the first rank of a stage, run its schedule with and without the teacher, and say what that takes.

    Raises:
        ConfigError: megatron-core refuses the settings, or the teacher cannot be built.
    """
    config = plain_layers(run.config, is_on_gpu=run.for_gpu)
    transformer = config.transformer
    num_ranks = run.world_size // transformer.pipeline_model_parallel_size
    first = stage * num_ranks
    with meta_rank(config, rank=first, world_size=run.world_size, is_on_gpu=run.for_gpu) as context:
        with torch.device(META):
            student = build_student(
                config, context, vocab_size=run.vocab_size, padded_vocab_size=run.padded_vocab_size
            )
        optimizer = build_optimizer(config, student)
        sizes = sizes_of_rank(student, optimizer, context.tp_size)
        plain = _trace(run, config, context, student)
        memory, teacher, teacher_flops = (
            StageMemory(sizes.weights, sizes.gradients, sizes.optimizer, plain.peak_bytes),
            None,
            0.0,
        )
        if config.let.is_on and find_layer(student.gpt_chunks, student_layer_of_run(config)) is not None:
            memory, teacher = _with_teacher(run, config, context, student, memory)
            teacher_flops = (
                teacher.flops_per_token * config.training.micro_batch_size * config.model.seq_length
            )
        layers = [layer.layer_number for chunk in student.gpt_chunks for layer in chunk.decoder.layers]
        return StagePlan(
            stage=stage,
            ranks=(first, first + num_ranks - 1),
            layers=tuple(layers),
            has_embedding=any(chunk.pre_process for chunk in student.gpt_chunks),
            has_head=any(chunk.post_process for chunk in student.gpt_chunks),
            parameters=sizes.parameters,
            whole_parameters=sizes.whole_parameters,
            memory=memory,
            flops=plain.flops / run.num_microbatches,
            teacher_flops=teacher_flops,
        ), teacher


def _trace(
    run: TracedRun,
    config: RunConfig,
    context: MetaContext,
    student: Student,
    alignment: Alignment | None = None,
) -> Tracer:
    """Run one iteration's schedule; weights, gradients and the teacher's weights are not counted."""
    step = ForwardStep(config, context, _NO_EOD, alignment, Heartbeat())
    forget_rotary_angles()
    for chunk in student.chunks:
        chunk.zero_grad_buffer()
    with traced(num_shares=context.cp_size) as tracer:
        held = [parameter for chunk in student.chunks for parameter in chunk.parameters()]
        if alignment is not None and alignment.teacher is not None:
            held += alignment.teacher.parameters()
        for tensor in (*held, *gradient_buffers(student)):
            tracer.see(tensor, is_counted=False)
        if alignment is not None:
            alignment.begin_iteration(0, num_microbatches=run.num_microbatches, loss_scale=1.0)
        iterators = [_samples(config) for _ in student.chunks]
        run_schedule(
            config, student, step, iterators, num_microbatches=run.num_microbatches, forward_only=False
        )
        if alignment is not None:
            alignment.end_iteration()
    return tracer


def _samples(config: RunConfig) -> Iterator[Sample]:
    """Yield microbatches as the loader does, on the CPU."""
    tokens = torch.zeros(config.training.micro_batch_size, config.model.seq_length, dtype=torch.long)
    while True:
        yield {"tokens": tokens, "labels": tokens}


def _with_teacher(
    run: TracedRun, config: RunConfig, context: MetaContext, student: Student, memory: StageMemory
) -> tuple[StageMemory, TracedTeacher]:
    """Return the memory of the stage with the teacher on it, and what the teacher is."""
    length, flight = config.model.seq_length, _Flight()
    bos = teacher_bos(config)
    with traced() as tracer:
        teacher = with_bos(planned_teacher(config), bos)
        length_read = min(length, teacher.context_length or length)
        tracer.flops = 0.0
        states = teacher.states(torch.zeros(1, length_read, dtype=torch.long, device=META))  # [1, l, d_t]
    alignment = Alignment(
        AlignmentObjective(LetSchedule(1.0, 1), student_layer_of_run(config), flight.loss),
        student,
        context,
        teacher,
        is_sequence_parallel=student.core_config.sequence_parallel,
        calculate_per_token_loss=config.transformer.calculate_per_token_loss,
        tells_own_loss=False,
    )
    with patch.object(alignment, "prepare", _counted(alignment, flight)):
        guided = _trace(run, config, context, student, alignment)
    alignment.release()
    shares = context.cp_size * (context.tp_size if student.core_config.sequence_parallel else 1)
    tokens = config.training.micro_batch_size * length // shares
    weights = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    memory = replace(
        memory,
        teacher_weights=weights,
        teacher_peak=guided.peak_bytes - memory.activations,
        teacher_states=flight.most * tokens * states.shape[-1] * states.element_size(),
    )
    flops = tracer.flops / length_read
    return memory, TracedTeacher(teacher.description, teacher.vocab_size, weights, flops)


def _counted(alignment: Alignment, flight: _Flight) -> Callable[..., None]:
    """Return the alignment's `prepare`, with the microbatches counted that begin their flight."""
    prepare = alignment.prepare

    def count(chunk: int, batch: Microbatch | None) -> None:
        prepare(chunk, batch)
        if chunk == alignment.owner_chunk:
            flight.now += 1
            flight.most = max(flight.most, flight.now)

    return count


def planned_teacher(config: RunConfig) -> Teacher:
    """Build the teacher on the meta device; no weights are read, and they need not be there.

    Raises:
        ConfigError: its description cannot be read, or it has no such layer.
    """
    path, let = Path(str(config.let.let_teacher_load)), config.let
    if teacher_format(config) == "hf":
        return empty_hf_teacher(
            path,
            layer=let.let_teacher_layer,
            dtype=teacher_dtype(config),
            trust_remote_code=let.let_trust_remote_code,
        )
    directory, run = _teacher_run(config)
    vocab_size, saved = int(run["vocab_size"]), run["config"]
    with torch.device(META):
        gpt = build_frozen_gpt(
            saved,
            padded_vocab_size=padded_vocab_size(
                vocab_size,
                saved["model"]["make_vocab_size_divisible_by"],
                saved["transformer"]["tensor_model_parallel_size"],
            ),
            layer=let.let_teacher_layer,
            dtype=teacher_dtype(config),
            device=META,
        )
    return MegatronTeacher(gpt, vocab_size=vocab_size, description=str(directory))


def teacher_vocab_size(config: RunConfig) -> int:
    """Return how many token ids the teacher knows, having checked that it has the layer.

    Raises:
        ConfigError: as planned_teacher.
    """
    path, let = Path(str(config.let.let_teacher_load)), config.let
    if teacher_format(config) == "hf":
        model = read_config(path, trust_remote_code=let.let_trust_remote_code)
        check_layer(path, let.let_teacher_layer, model.num_hidden_layers)
        return int(model.vocab_size)
    return int(_teacher_run(config)[1]["vocab_size"])


def _teacher_run(config: RunConfig) -> tuple[Path, dict[str, Any]]:
    """Return the teacher's newest checkpoint and what it says of its run."""
    directory = newest_iteration_directory(Path(str(config.let.let_teacher_load)))
    run = load_common(directory).get(RUN)
    if run is None:
        raise ConfigError(f"teacher checkpoint {directory} was not written by megatron_let; convert it first")
    check_layer(directory, config.let.let_teacher_layer, run["config"]["transformer"]["num_layers"])
    return directory, run
