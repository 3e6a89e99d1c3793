"""LET in somebody else's Megatron loop: attached to its model chunks and its forward step.

    let = attach_let(model, loop, load_teacher=..., objective=AlignmentObjective(LetSchedule(0.1, 3000), student_layer=3))
    forward_backward_func(forward_step_func=let.forward_step(forward_step), data_iterator=..., model=model, ...)

The same code does the work as in this project's trainer, so that gradients are the same bits. How it goes into
Megatron-LM's pretrain_gpt.py: docs/megatron-lm.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_let.errors import ConfigError
from megatron_let.let import AlignmentObjective, Teacher
from megatron_let.mcore.batch import find_document_starts
from megatron_let.mcore.layer_tap import find_layer
from megatron_let.mcore.model import Student, gpt_of, student_of
from megatron_let.mcore.parallel import ParallelContext, current_context
from megatron_let.training.alignment import Alignment, AlignmentReport, load_apart
from megatron_let.training.teachers import require_ids

Output = TypeVar("Output")
Sample = Mapping[str, Tensor]
"""A microbatch as the data iterator gives it: `tokens` [b, s] ids and `loss_mask` [b, s], and whatever else."""

ForwardStep = Callable[[Any, torch.nn.Module], Output]


@dataclass(frozen=True)
class HostLoop:
    """What the loop that LET is attached to knows; asked when the first microbatch of an iteration is there."""

    iteration: Callable[[], int]
    """Completed iterations, skipped ones included: after a resume those of the checkpoint, and more."""

    num_microbatches: Callable[[], int]
    """Of the iteration that begins, on this data-parallel rank."""

    report: Callable[[int, float, AlignmentReport], None] | None = None
    """Called with the completed iterations, the weight of the last one and LET's numbers, by one rank of layer k's stage."""

    report_interval: int = 100
    """Iterations between two reports."""


@dataclass(frozen=True)
class _Rows:
    """A microbatch as LET reads it; the names are explained at `AlignedRows`."""

    full_tokens: Tensor
    loss_mask: Tensor
    document_starts: Tensor | None


class AttachedLet:
    """What `attach_let` returns. On ranks without layer k, and after S_stop, it does nothing."""

    def __init__(
        self,
        context: ParallelContext,
        student: Student,
        loop: HostLoop,
        alignment: Alignment | None,
        *,
        eod: int | None,
    ) -> None:
        self._context = context
        self._student = student
        self._loop = loop
        self._alignment = alignment
        self._eod = eod
        self._begun: int | None = None
        self._reported: int | None = None
        self._shape: tuple[int, int] | None = None

    @property
    def is_released(self) -> bool:
        """Return whether there is no teacher on this rank: it never had one, or S_stop has passed."""
        return self._alignment is None

    def forward_step(self, forward_step: ForwardStep[Output]) -> ForwardStep[Output]:
        """Return `forward_step(data_iterator, model)` with LET in its backward; wrap it once and use it for all.

        On the chunk of layer k it takes the microbatch from the iterator first, shows it to the teacher and hands it
        on. The first tensor-parallel rank must have an iterator there, on a middle pipeline stage too. A model in
        evaluation mode, or without gradient, passes untouched.
        """

        @wraps(forward_step)
        def step(data_iterator: Any, model: torch.nn.Module) -> Output:
            return forward_step(self._shown(data_iterator, model), model)

        return step

    def finish(self) -> None:
        """Report what has added up since the last report; for the end of the loop, where every rank calls it."""
        if self._alignment is not None and self._begun is not None:
            self._alignment.end_iteration()
            self._report(self._alignment, self._begun + 1)

    def release(self) -> None:
        """Take the hook off layer k and give the teacher's memory back; S_stop does so by itself."""
        if self._alignment is not None:
            self._alignment.release()
        self._alignment = None

    close = release

    def _shown(self, data_iterator: Any, model: torch.nn.Module) -> Any:
        """Show the next microbatch to the teacher; return an iterator that still gives it."""
        chunk = gpt_of(model).vp_stage or 0
        is_training = model.training and torch.is_grad_enabled()
        if self._alignment is None or chunk != self._alignment.owner_chunk:
            return data_iterator
        if not is_training:
            # an evaluation follows a whole iteration, and may be the last that is called
            if self._begun is not None and self._is_report_due(self._alignment, self._begun + 1):
                self.finish()
            return data_iterator
        self._begin_iteration_when_due(self._alignment)
        if self._alignment is None:
            return data_iterator
        sample = None
        if self._context.tp_rank == 0:
            sample = self._next_sample(data_iterator)
        self._alignment.prepare(chunk, self._rows(sample))
        return data_iterator if sample is None else iter((sample,))

    def _begin_iteration_when_due(self, alignment: Alignment) -> None:
        iteration = self._loop.iteration()
        if iteration == self._begun:
            return
        alignment.end_iteration()  # of the one before
        if self._begun is not None and self._is_report_due(alignment, iteration):
            self._report(alignment, iteration)
        self._begun = iteration
        if not alignment.objective.schedule.is_active_at(iteration):
            self.release()
            return
        alignment.begin_iteration(
            iteration, num_microbatches=self._loop.num_microbatches(), loss_scale=self._loss_scale()
        )

    def _is_report_due(self, alignment: Alignment, iteration: int) -> bool:
        """Return whether the numbers are to be told after `iteration` iterations: at the interval, and at S_stop."""
        is_over = not alignment.objective.schedule.is_active_at(iteration)
        return is_over or iteration % self._loop.report_interval == 0

    def _report(self, alignment: Alignment, iteration: int) -> None:
        """Hand LET's numbers to the loop's report, once an iteration; all ranks of the stage: their sums are added up."""
        report, context = self._loop.report, self._context
        if report is None or iteration == self._reported:
            return
        self._reported = iteration
        numbers = alignment.collect()
        if numbers is not None and context.tp_rank == context.dp_rank == 0:
            report(iteration, alignment.objective.schedule.weight_at(iteration - 1), numbers)

    def _loss_scale(self) -> float | Tensor:
        scale = self._student.core_config.grad_scale_func
        if scale is None:
            return 1.0
        scaled: Tensor = scale(torch.ones((), device=self._context.device))
        return scaled

    @staticmethod
    def _next_sample(data_iterator: Iterator[Sample] | None) -> Sample:
        if data_iterator is None:
            raise ConfigError(
                "LET: the pipeline stage that holds layer k has no data; build the data set there too (see "
                "docs/megatron-lm.md) or choose a layer of the first stage"
            )
        sample = next(data_iterator)
        missing = [name for name in ("tokens", "loss_mask") if name not in sample]
        if missing:
            raise ConfigError(
                f"LET: the data iterator gives {', '.join(sorted(sample))} and no {' and no '.join(missing)}"
            )
        return sample

    def _rows(self, sample: Sample | None) -> _Rows:
        """Return the microbatch on every tensor-parallel rank; the first alone brings it."""
        context = self._context
        if self._shape is None:
            shape = torch.tensor([0, 0] if sample is None else sample["tokens"].shape, device=context.device)
            rows, length = context.from_first_tensor_rank(shape).tolist()
            self._shape = (int(rows), int(length))
        if sample is None:
            tokens = torch.empty(self._shape, dtype=torch.int64, device=context.device)
            loss_mask = torch.empty(self._shape, dtype=torch.float32, device=context.device)
        else:
            given = tuple(sample["tokens"].shape)
            assert given == self._shape, f"a microbatch of shape {given} after others of {self._shape}"
            tokens = sample["tokens"].to(context.device, torch.int64, non_blocking=True)
            loss_mask = sample["loss_mask"].to(context.device, torch.float32, non_blocking=True)
        for tensor in (tokens, loss_mask):
            context.from_first_tensor_rank(tensor)
        starts = None if self._eod is None else find_document_starts(tokens, self._eod).cpu()
        return _Rows(tokens, loss_mask, starts)


def attach_let(
    model: Sequence[torch.nn.Module],
    loop: HostLoop,
    *,
    load_teacher: Callable[[torch.device], Teacher],
    objective: AlignmentObjective,
    num_ids: int,
    eod: int | None = None,
) -> AttachedLet:
    """Put LET on layer k of a model that megatron-core's pipeline schedules train; every rank calls this.

    Nothing is communicated here, so that it may be called within the first forward step.

    Args:
        model: this rank's model chunks, GPTModels bare or wrapped, one a virtual stage.
        loop: what the loop knows. Where S_stop stands in the run follows from `loop.iteration` alone.
        load_teacher: loads the frozen teacher onto a device. Called on the ranks that hold layer k, unless S_stop
            has passed.
        objective: layer k, the weight and S_stop.
        num_ids: token ids of the tokenizer that made the data, which must be the teacher's.
        eod: id of the end of document where the student sees documents apart (`--reset-attention-mask`), else None.

    Raises:
        ConfigError: no GPT, context parallel, a layer that the model does not have, or a teacher that knows fewer
            ids; what `load_teacher` raises.
    """
    student = student_of(model)
    core = student.core_config
    if core.context_parallel_size > 1:
        raise ConfigError(
            "LET is not attached to context-parallel runs of other programs; use pretrain_let.py"
        )
    if not 1 <= objective.student_layer <= core.num_layers:
        raise ConfigError(
            f"LET: student layer {objective.student_layer} of a model with layers 1 to {core.num_layers}"
        )
    first = next((parameter for chunk in model for parameter in chunk.parameters()), None)
    assert first is not None, "a model chunk has weights"
    context = current_context(first.device, vp_size=core.virtual_pipeline_model_parallel_size)
    alignment = None
    is_here = find_layer(student.gpt_chunks, objective.student_layer) is not None
    if is_here and objective.schedule.is_active_at(loop.iteration()):
        teacher = load_apart(lambda: load_teacher(context.device), context.device)
        require_ids(num_ids, teacher.vocab_size, f"teacher {teacher.description}")
        alignment = Alignment(
            objective,
            student,
            context,
            teacher,
            is_sequence_parallel=core.sequence_parallel,
            calculate_per_token_loss=core.calculate_per_token_loss,
            all_reduce_sum=context.sum_over_stage,
        )
    return AttachedLet(context, student, loop, alignment, eod=eod)
