"""LET during a run: joins the teacher (`let/`) to layer k of the student (`mcore/`) on the stage that owns it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_let.config.run_config import RunConfig
from megatron_let.let import (
    AlignmentObjective,
    AlignmentSums,
    AlignmentTarget,
    Teacher,
    add_alignment_gradient,
    segment_states,
    with_bos,
)
from megatron_let.mcore.batch import context_parallel_slice, sequence_parallel_slice
from megatron_let.mcore.finite import Norms
from megatron_let.mcore.layer_tap import LayerTap, find_layer
from megatron_let.mcore.model import Student
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.training.let_record import LetRecord
from megatron_let.training.teacher_loss import TeacherLoss
from megatron_let.training.teachers import load_teacher


class AlignedRows(Protocol):
    """What LET reads of a microbatch."""

    @property
    def full_tokens(self) -> torch.Tensor:
        """[b, s] ids, what the teacher reads."""

    @property
    def loss_mask(self) -> torch.Tensor:
        """[b, s/cp] this context-parallel rank's share: 1.0 where a token counts in the loss."""

    @property
    def document_starts(self) -> torch.Tensor | None:
        """[b, s] True at the first token of a document, or None where documents see each other."""


@dataclass(frozen=True)
class AlignmentNorms:
    """One norm a microbatch on the owner stage: what tells NaN and infinity, and where they come from."""

    states: Norms
    """Of the teacher's states that are this rank's, masked positions included."""

    losses: Norms
    """Of LET's loss sum."""

    gradients: Norms
    """Of the loss sum's gradient at layer k, unscaled."""

    def clear(self) -> None:
        """Forget all: a new iteration begins."""
        for norms in (self.states, self.losses, self.gradients):
            norms.clear()


@dataclass(frozen=True)
class AlignmentReport:
    """LET's numbers over a logging interval, token-weighted; `loss` is not multiplied by the weight."""

    loss: float
    cosine: float
    centred_cosine: float


class Alignment:
    """The teacher, the tap on layer k and the sums for the log.

    Every rank has one; only the ranks of the owner stage hold a teacher and a tap, until `is_released`. The teacher is
    un-sharded: each rank runs it on its whole microbatch and keeps the slice of the states that belongs to its slice
    of layer k.
    """

    def __init__(
        self,
        objective: AlignmentObjective,
        student: Student,
        context: ParallelContext,
        teacher: Teacher | None,
        *,
        is_sequence_parallel: bool,
        calculate_per_token_loss: bool,
        is_watched: bool = False,
        tells_own_loss: bool = True,
        all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Put the tap on layer k, if it is here; `is_watched`: keep `norms` of what the teacher brings.

        `tells_own_loss`: say after the first iteration how well the teacher itself predicts.
        `all_reduce_sum` adds up what `collect` returns, by default over all ranks.
        """
        self.objective = objective
        self.teacher = teacher
        self._context = context
        self._all_reduce_sum = all_reduce_sum or context.all_reduce_sum
        self._is_sequence_parallel = is_sequence_parallel
        self._calculate_per_token_loss = calculate_per_token_loss
        self._width = student.core_config.hidden_size
        self._sums = self._sums_before = self._no_tokens()
        self.norms = AlignmentNorms(*(Norms(context.device) for _ in range(3)))
        self._is_watched = is_watched
        self._iteration = 0
        self._num_microbatches = 1
        self._loss_scale: float | torch.Tensor = 1.0
        self._is_training = False
        self.is_released = False
        self._first_loss = TeacherLoss.none(context.device) if tells_own_loss else None
        owner = find_layer(student.gpt_chunks, objective.student_layer)
        self.owner_chunk = None if owner is None else owner[0]
        self._tap: LayerTap[AlignmentTarget] | None = None
        if owner is not None:
            self._tap = LayerTap(owner[1], add_alignment_gradient)
        assert (owner is None) == (teacher is None), "the teacher is built on the owner stage, and only there"

    def begin_iteration(
        self, completed_iterations: int, *, num_microbatches: int, loss_scale: float | torch.Tensor
    ) -> None:
        """Fix what is constant over the microbatches of an iteration: the weight, their number, the loss scale."""
        self._iteration = completed_iterations
        self._num_microbatches = num_microbatches
        self._loss_scale = loss_scale
        self._is_training = self.objective.schedule.is_active_at(completed_iterations)
        self._sums_before = self._sums
        self.norms.clear()

    def end_iteration(self) -> None:
        """Check that every microbatch met its gradient, and let evaluation pass untouched.

        After the first one the teacher's own loss is added up, by one all-reduce of three numbers, and told.
        """
        if self._is_training and self._first_loss is not None:
            total = TeacherLoss(self._all_reduce_sum(self._first_loss.numbers))
            if self._context.tp_rank == self._context.cp_rank == self._context.dp_rank == 0:
                total.tell()
            self._first_loss = None
        self._is_training = False
        if self._tap is not None:
            self._tap.check_drained()

    def drop_iteration(self) -> None:
        """Leave the iteration just ended out of the numbers that `collect` returns."""
        self._sums = self._sums_before

    def prepare(self, chunk: int, batch: AlignedRows | None) -> None:
        """Run the teacher for the microbatch whose forward through model chunk `chunk` comes next.

        Does nothing on other chunks, in evaluation, and where the weight is zero.
        """
        if not self._is_training or chunk != self.owner_chunk or self._tap is None:
            return
        assert batch is not None, "the stage that owns layer k reads the data"
        assert self.teacher is not None, "the owner stage holds the teacher"
        states = segment_states(self.teacher, batch.full_tokens, batch.document_starts)  # [b, s, d_t]
        self._measure(states, batch.full_tokens)
        self._tap.push(self._target(batch, states))

    def _measure(self, states: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take the teacher's own loss of the first microbatch, once, and let its LM head go.

        Ranks that share a microbatch leave it to the first of them.
        """
        assert self.teacher is not None, "it gave the states"
        head = self.teacher.take_lm_head()
        if head is None or self._context.tp_rank or self._context.cp_rank:
            return
        self._first_loss = TeacherLoss.measure(head, states, tokens, self.teacher.vocab_size)

    def _target(self, batch: AlignedRows, states: torch.Tensor) -> AlignmentTarget:
        context = self._context
        states = context_parallel_slice(states, dim=1, rank=context.cp_rank, size=context.cp_size)
        states, mask = states.transpose(0, 1), batch.loss_mask.transpose(0, 1)  # [s/cp, b, d_t], [s/cp, b]
        if self._is_sequence_parallel:
            # contiguous: a view would keep the whole sequence's states alive until backward
            states, mask = (
                sequence_parallel_slice(x, dim=0, rank=context.tp_rank, size=context.tp_size).contiguous()
                for x in (states, mask)
            )
        if self._is_watched:
            self.norms.states.add(states)
        return AlignmentTarget(
            states=states,
            mask=mask,
            gradient_scale=self.objective.gradient_scale(
                self._iteration,
                loss_scale=self._loss_scale,
                num_tokens=batch.loss_mask.sum(),
                num_microbatches=self._num_microbatches,
                calculate_per_token_loss=self._calculate_per_token_loss,
            ),
            record=self._record,
            loss=self.objective.loss,
            inspect=self.norms.gradients.add if self._is_watched else None,
        )

    def _record(self, sums: AlignmentSums) -> None:
        self._sums = self._sums + sums
        if self._is_watched:
            self.norms.losses.add(sums.loss_sum.float())

    def collect(self) -> AlignmentReport | None:
        """Return the numbers since the last call and start anew; every rank that is added up must call this.

        One all-reduce of 5 + 2 h numbers. Without sequence parallel all tensor-parallel ranks saw the same tokens,
        so only the first of them counts. None when no token was aligned.
        """
        counts = self._is_sequence_parallel or self._context.tp_rank == 0
        vector = (self._sums if counts else self._no_tokens()).to_vector()
        self._sums = self._no_tokens()
        total = AlignmentSums.from_vector(self._all_reduce_sum(vector))
        if float(total.count) == 0.0:
            return None
        return AlignmentReport(float(total.loss()), float(total.cosine()), float(total.centred_cosine()))

    def release(self) -> None:
        """Take the hook off layer k, drop the teacher and give its memory back; `is_released` from here on."""
        self.is_released = True
        if self._tap is not None:
            self._tap.remove()
        self._tap = None
        self.teacher = None
        gc.collect()
        if self._context.is_on_gpu:
            torch.cuda.empty_cache()

    def _no_tokens(self) -> AlignmentSums:
        return AlignmentSums.zeros(self._width, device=self._context.device)


def load_apart(load: Callable[[], Teacher], device: torch.device) -> Teacher:
    """Return what `load` gives, with the random states left as they were.

    Building a model draws random numbers; the student's dropout must not depend on there being a teacher.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return load()


def build_alignment(
    config: RunConfig, context: ParallelContext, student: Student, record: LetRecord
) -> Alignment:
    """Load the teacher on the stage that owns layer k, and put the tap there; every rank calls this.

    Raises:
        ConfigError: the teacher cannot be used.
    """

    def load() -> Teacher | None:
        if find_layer(student.gpt_chunks, record.student_layer) is None:
            return None
        teacher = load_apart(lambda: load_teacher(config, context), context.device)
        return with_bos(teacher, record.teacher_bos)

    teacher = context.together(load)
    return Alignment(
        AlignmentObjective(record.schedule(), record.student_layer),
        student,
        context,
        teacher,
        is_sequence_parallel=student.core_config.sequence_parallel,
        calculate_per_token_loss=config.transformer.calculate_per_token_loss,
        is_watched=config.ddp.check_for_nan_in_grad,
    )
