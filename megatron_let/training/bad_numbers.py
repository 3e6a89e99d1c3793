"""NaN and infinity: such an iteration is skipped and told, a teacher's ends the run, too many in a row do too.

Each iteration one all-reduce of six numbers tells every rank alike, before anything is stepped, whether a loss, a
teacher's state, LET or a rank's own gradient is not finite; the gradient's norm after communication is looked at inside
the step. Who, where and which parameter is looked up only then. docs/decisions/0009-bad-numbers.md says why so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import BadNumbersError
from megatron_let.log import LOGGER
from megatron_let.mcore.finite import count_bad
from megatron_let.mcore.model import Student
from megatron_let.mcore.optimizer import smallest_loss_scale, step_if_finite
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.student_watch import StudentWatch
from megatron_let.training.alignment import Alignment
from megatron_let.training.findings import Finding, Kind, Search, describe, first_of
from megatron_let.training.loss_spikes import LossSpikes
from megatron_let.training.state import TrainingState


@dataclass(frozen=True)
class StepOutcome:
    """What came of one iteration's gradients."""

    is_updated: bool
    is_bad: bool
    """NaN or infinity that no lower loss scale would cure: nothing was stepped, and its losses count nowhere."""

    grad_norm: float | None
    num_zeros: float | None


@dataclass(frozen=True)
class _Totals:
    """An iteration over all ranks: its loss, and how many of each kind were not finite."""

    loss: float
    losses: int
    teacher: int
    alignment: int
    gradients: int


class BadNumbersGuard:
    """Stands between the gradients and the optimizer; keeps the last good state of the run.

    `--no-check-for-nan-in-loss-and-grad` turns all of it off: then it steps, whatever the numbers are.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        student: Student,
        alignment: Alignment | None,
        state: TrainingState,
    ) -> None:
        self._config, self._context, self._alignment = config, context, alignment
        self._watch = StudentWatch(student, context) if config.ddp.check_for_nan_in_grad else None
        self._spikes = LossSpikes()
        self._good = replace(state)
        self._in_a_row = 0
        self._last_line = ""
        self._ending: str | None = None
        self._advice = ""

    def begin_iteration(self) -> None:
        """Forget what the iteration before left."""
        if self._watch is not None:
            self._watch.begin_iteration()

    def step(self, optimizer: Any, losses: Sequence[torch.Tensor], state: TrainingState) -> StepOutcome:
        """Step the optimizer unless a number is bad; count and tell it when one is. Every rank calls this.

        Args:
            optimizer: Megatron's, with the reduced gradients of the iteration.
            losses: [sum, count] of each microbatch in fp64, on the last stage alone.
            state: of the run before this iteration; its `nan_iterations` is counted up here.
        """
        if self._watch is None:
            return self._step_regardless(optimizer, state)
        totals = self._vote(losses)
        search = Search(self._context, self._watch, self._alignment)
        is_scaled = self._config.transformer.fp16  # an overflow is the loss scaler's to see first
        is_bad = bool(totals.losses or totals.teacher or totals.alignment)
        if is_bad or (totals.gradients and not is_scaled):
            self._note(state, self._together(search.findings(losses)))
            return StepOutcome(False, True, None, None)
        scale = optimizer.get_loss_scale()
        is_updated, grad_norm, num_zeros = step_if_finite(optimizer)
        if not is_updated and (grad_norm is not None or not _can_fall(optimizer, scale)):
            findings = self._together([*search.findings(losses), *search.reduced()])
            self._note(state, findings, grad_norm=math.inf if grad_norm is None else grad_norm)
            return StepOutcome(False, True, grad_norm, None)
        if is_updated:  # an overflow of fp16 in between neither adds to a bad stretch nor ends it
            self._in_a_row = 0
        spike = self._spikes.add(totals.loss) if math.isfinite(totals.loss) else None
        if spike is not None:
            LOGGER.warning(f"loss spike at iteration {state.iteration + 1}: {spike}")
        return StepOutcome(is_updated, False, grad_norm, num_zeros)

    def end_iteration(self, state: TrainingState) -> None:
        """Take note of the state after an iteration; a good one is what a checkpoint may hold."""
        if self._in_a_row == 0:
            self._good = replace(state)
        elif self._ending is None and self._in_a_row >= self._config.training.max_skipped_iterations:
            self._ending = (
                f"{self._in_a_row} iterations in a row up to {state.iteration} had NaN or infinity "
                f"(--max-skipped-iterations), the last: {self._last_line}"
            )
            self._advice = "look at these or lower --lr, then resume with --load"

    def state_to_save(self, state: TrainingState) -> TrainingState:
        """Return the state that a checkpoint of now is of: the present one, or the last good one in a bad stretch.

        Weights, moments and schedule are those of the last good iteration either way; with its counters the data of the
        bad ones will be met again, and no checkpoint is newer than the last good one.
        """
        return state if self._in_a_row == 0 else replace(self._good)

    @property
    def must_end(self) -> bool:
        """Return whether the run has to end; every rank alike."""
        return self._ending is not None

    def poisoned_weight(self) -> str | None:
        """Return in words which weight is not finite on some rank, or None; every rank calls this, before a save."""
        if self._watch is None:
            return None
        search = Search(self._context, self._watch, self._alignment)
        findings = self._together(search.bad_weights())
        return describe(findings) if findings else None

    def error(self, state: TrainingState, *, saved: str) -> BadNumbersError:
        """Return the error that ends the run: what was bad, what was `saved`, what to do."""
        first, last = self._good.consumed_samples, state.consumed_samples - 1
        return BadNumbersError(
            f"{self._ending}; {saved}; training samples {first} to {last} were being read; {self._advice}"
        )

    def _step_regardless(self, optimizer: Any, state: TrainingState) -> StepOutcome:
        is_updated, grad_norm, num_zeros = optimizer.step()
        if is_updated and grad_norm is not None and not math.isfinite(grad_norm):
            state.nan_iterations += 1
        return StepOutcome(bool(is_updated), False, grad_norm, num_zeros)

    def _vote(self, losses: Sequence[torch.Tensor]) -> _Totals:
        """Return the iteration over all ranks; every rank gets the same.

        Tensor-parallel ranks bring their loss twice and more, which leaves sum / count as it is.
        """
        assert self._watch is not None
        zero = torch.zeros((), dtype=torch.float64, device=self._context.device)
        loss_sum = count = bad_losses = teacher = alignment = zero
        if losses:
            each = torch.stack(list(losses))  # [microbatches, 2]
            loss_sum, count = each.sum(0).unbind()
            bad_losses = count_bad(each[:, 0])
        if self._alignment is not None:
            norms = self._alignment.norms
            teacher, alignment = norms.states.num_bad(), norms.losses.num_bad() + norms.gradients.num_bad()
        mine = [loss_sum, count, bad_losses, teacher, alignment, self._watch.num_bad_gradients()]
        summed = self._context.all_reduce_sum(torch.stack(mine)).tolist()
        loss = summed[0] / summed[1] if summed[1] else math.nan
        return _Totals(loss, *(int(number) for number in summed[2:]))

    def _together(self, findings: list[Finding]) -> list[Finding]:
        return [finding for of_rank in self._context.gather(findings) for finding in of_rank]

    def _note(
        self, state: TrainingState, findings: Sequence[Finding], *, grad_norm: float | None = None
    ) -> None:
        """Count a bad iteration and say what was bad; a bad teacher ends the run."""
        self._in_a_row += 1
        state.nan_iterations += 1
        if self._alignment is not None:
            self._alignment.drop_iteration()
        iteration, teacher = state.iteration + 1, first_of(findings, Kind.TEACHER)
        if teacher is not None:
            self._ending = (
                f"the teacher {self._config.let.let_teacher_load} gave {teacher.value} at iteration {iteration} on "
                f"{teacher.where}; the student has not met it"
            )
            self._advice = (
                "check the teacher's files, or give it more range with --let-teacher-dtype bf16 or fp32"
            )
            return
        self._last_line = describe(findings, grad_norm=grad_norm)
        LOGGER.warning(
            f"iteration {iteration} skipped: {self._last_line}; {self._in_a_row} in a row (at most "
            f"{self._config.training.max_skipped_iterations}), {state.nan_iterations} in all"
        )


def _can_fall(optimizer: Any, scale: torch.Tensor) -> bool:
    """Return whether a dynamic loss scale could still fall from `scale`: then an overflow is nothing bad."""
    smallest = smallest_loss_scale(optimizer)
    return smallest is not None and float(scale) > smallest
