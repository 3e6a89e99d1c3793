"""The training loop: iterate, log, validate, save, stop."""

from __future__ import annotations

import gc
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from megatron_let.config.batches import BatchPlan
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import EXIT_DONE, EXIT_PREEMPTED, BadNumbersError
from megatron_let.mcore.checkpoint import Parts
from megatron_let.mcore.datasets import DataSplits
from megatron_let.mcore.model import gathered_parameters
from megatron_let.mcore.optimizer import learning_rate
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.schedule import run_schedule
from megatron_let.mcore.weights_norm import weights_norm
from megatron_let.training.alignment import Alignment
from megatron_let.training.bad_numbers import BadNumbersGuard
from megatron_let.training.evaluation import data_iterators, evaluate, reduce_loss
from megatron_let.training.forward_step import LM_LOSS, ForwardStep
from megatron_let.training.report import IntervalTotals, ReleaseTimer, Reporter
from megatron_let.training.saving import CheckpointSaver
from megatron_let.training.signals import StopRequest
from megatron_let.training.state import TrainingState


@dataclass(frozen=True)
class Run:
    """Everything a run works with, assembled by `training/build.py`."""

    config: RunConfig
    context: ParallelContext
    parts: Parts
    data: DataSplits
    forward_step: ForwardStep
    alignment: Alignment | None
    reporter: Reporter
    saver: CheckpointSaver | None
    """None without `--save`."""
    batches: BatchPlan
    total_iterations: int


class Trainer:
    """Runs the iterations of one run; `state` is all that changes."""

    def __init__(self, run: Run, state: TrainingState, stop: StopRequest) -> None:
        self.run = run
        self.state = state
        self._stop = stop
        self._heartbeat = run.forward_step.heartbeat
        self._total = run.total_iterations
        self._interval = IntervalTotals(run.context.device)
        self._release_timer = ReleaseTimer()
        self._guard = BadNumbersGuard(run.config, run.context, run.parts.student, run.alignment, state)
        self._last_saved = state.iteration

    def fit(self) -> int:
        """Train to the end (or until told to stop) and return the exit code; every rank calls this."""
        try:
            return self._train()
        finally:
            # A preempted program ends without exit handlers: what TensorBoard and W&B still hold goes out here.
            self.run.reporter.close()

    def _train(self) -> int:
        config = self.run.config
        iterators = self.open_data()
        while self.state.iteration < self._total and not config.validation.skip_train:
            self.step(iterators)
            if self.state.iteration < self._total and self._should_leave():
                self._save(is_last=True)
                return EXIT_PREEMPTED
        self._save(is_last=True)
        self._validate(self.run.data.valid, "validation")
        self._validate(self.run.data.test, "test")
        return EXIT_DONE

    def open_data(self) -> list[Any]:
        """Return the iterators that `step` reads, one a model chunk, from where the run stands; the clock starts."""
        run = self.run
        if run.config.training.manual_gc:
            gc.disable()
        self._interval.start()
        return data_iterators(
            run.config,
            run.context,
            run.parts.student,
            run.forward_step,
            run.data.train,
            consumed_samples=self.state.consumed_samples,
        )

    def step(self, iterators: list[Any]) -> None:
        """Do one iteration with all that belongs to it: release, optimizer step, log, validation, checkpoint."""
        self._heartbeat.begin(self.state.iteration + 1)
        if self.run.saver is not None:
            self.run.saver.poll()
        self._release_teacher_when_due()
        self._iterate(iterators)
        self._after_iteration()
        self._heartbeat.finish()

    def _iterate(self, iterators: list[Any]) -> None:
        """One optimizer step over one global batch; fp16's overflow and bad numbers skip it and are counted."""
        run, state, started = self.run, self.state, time.perf_counter()
        student, optimizer, scheduler = run.parts.student, run.parts.optimizer, run.parts.scheduler
        assert optimizer is not None, "a training run has an optimizer"
        assert scheduler is not None, "a training run has a schedule"
        batch_size = run.batches.global_batch_size(state.consumed_samples)
        num_microbatches = run.batches.num_microbatches(state.consumed_samples)
        for chunk in student.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        self._guard.begin_iteration()
        if run.alignment is not None:
            run.alignment.begin_iteration(
                state.iteration, num_microbatches=num_microbatches, loss_scale=optimizer.get_loss_scale()
            )
        begun = self._clock()
        reports = run_schedule(
            run.config,
            student,
            run.forward_step,
            iterators,
            num_microbatches=num_microbatches,
            forward_only=False,
        )
        if run.alignment is not None:
            run.alignment.end_iteration()
        self._empty_unused_memory(at_level=1)
        self._heartbeat.enter("optimizer")
        losses = [report[LM_LOSS] for report in reports]
        computed = self._clock()
        outcome = self._guard.step(optimizer, losses, state)
        self._interval.add_phases(forward_backward=computed - begun, optimizer=self._clock() - computed)
        self._empty_unused_memory(at_level=2)
        if outcome.is_updated:
            scheduler.step(increment=batch_size)
        else:
            state.skipped_iterations += 1
        state.iteration += 1
        state.consumed_samples += batch_size
        state.consumed_tokens += batch_size * run.config.model.seq_length
        seconds = time.perf_counter() - started
        state.elapsed_seconds += seconds
        self._release_timer.add(seconds)
        self._interval.add([] if outcome.is_bad else losses, outcome, batch_size, seconds)
        self._guard.end_iteration(state)

    def _clock(self) -> float:
        """Return the time in seconds, for the timers of phases when the GPU has done what it was given."""
        if self.run.context.is_on_gpu and self.run.config.logging.log_timers_to_tensorboard:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _empty_unused_memory(self, *, at_level: int) -> None:
        if self.run.context.is_on_gpu and self.run.config.training.empty_unused_memory_level >= at_level:
            torch.cuda.empty_cache()

    def _after_iteration(self) -> None:
        config, iteration = self.run.config, self.state.iteration
        if line := self._release_timer.line(is_last=iteration == self._total):
            self.run.reporter.say(line)
        if iteration % config.logging.log_interval == 0 or iteration == self._total:
            self._log()
        if self._guard.must_end:
            self._end_with_bad_numbers()
        interval = config.training.manual_gc_interval
        if config.training.manual_gc and interval and iteration % interval == 0:
            gc.collect()
        every = config.validation.eval_interval
        if every and iteration % every == 0 and iteration < self._total:
            self._validate(self.run.data.valid, "validation")
        every = config.checkpoint.save_interval
        if every and iteration % every == 0:
            self._save()

    def _log(self) -> None:
        """Reduce the interval's numbers over all ranks and report them."""
        self._heartbeat.enter("log")
        run, totals = self.run, self._interval
        lm_loss = reduce_loss(totals.loss, run.context)
        let_report = None if run.alignment is None else run.alignment.collect()
        let_weight = None
        if run.alignment is not None and let_report is not None:
            let_weight = run.alignment.objective.schedule.weight_at(self.state.iteration - 1)
        params_norm = None
        if run.config.logging.log_params_norm:
            with self._gathered():
                params_norm = weights_norm(run.parts.student, run.context)
        run.reporter.training(
            self.state,
            totals,
            lm_loss=lm_loss,
            let_report=let_report,
            let_weight=let_weight,
            learning_rate=learning_rate(run.parts.optimizer),
            loss_scale=float(run.parts.optimizer.get_loss_scale()) if run.parts.optimizer else 1.0,
            total_iterations=self._total,
            samples_left=run.batches.samples_of_iterations(
                self._total - self.state.iteration, self.state.consumed_samples
            )
            - self.state.consumed_samples,
            params_norm=params_norm,
        )
        totals.start()

    def _validate(self, dataset: Any, name: str) -> None:
        run = self.run
        if dataset is None or run.config.validation.eval_iters == 0:
            return
        self._heartbeat.enter("evaluation")
        with self._gathered():
            loss = evaluate(run.config, run.context, run.parts.student, run.forward_step, dataset)
        if name == "validation":
            run.reporter.validation(self.state, loss)
        else:
            run.reporter.say(f" test loss at the end of training | lm loss value: {loss:.6E} |")

    def _save(self, *, is_last: bool = False) -> None:
        """Save the last good iteration unless it is saved already or there is nowhere to; the last save is waited for.

        Raises:
            BadNumbersError: a weight is not finite; nothing is written.
        """
        saver, state = self.run.saver, self._guard.state_to_save(self.state)
        if saver is None or self.run.config.validation.skip_train:
            return
        if self._last_saved != state.iteration:
            self._heartbeat.enter("save")
            with self._gathered():
                if poisoned := self._guard.poisoned_weight():
                    raise BadNumbersError(
                        f"iteration {state.iteration} is not saved: {poisoned}; resume from an older checkpoint"
                    )
                saver.begin(state)
            self._last_saved = state.iteration
        if is_last or not self.run.config.checkpoint.async_save:
            saver.wait()

    def _end_with_bad_numbers(self) -> NoReturn:
        """Save the last good state, unless it is, and raise BadNumbersError; every rank calls this."""
        good = self._guard.state_to_save(self.state)
        with self._gathered():
            poisoned = self._guard.poisoned_weight()
        if poisoned is None:
            self._save(is_last=True)
        if poisoned is not None:
            saved = f"nothing is saved, for {poisoned}"
        elif good.iteration == 0:
            saved = "there is nothing to save: no iteration was good"
        elif self._last_saved == good.iteration:
            saved = f"the last good state is in the checkpoint of iteration {good.iteration}"
        else:
            saved = f"the last good state, of iteration {good.iteration}, is lost: no --save was given"
        error = self._guard.error(self.state, saved=saved)
        self.state = good
        raise error

    def _gathered(self) -> AbstractContextManager[None]:
        return gathered_parameters(self.run.config, self.run.parts.student)

    def _should_leave(self) -> bool:
        """Say why the run leaves after this iteration, before its end, if it does; all ranks agree."""
        iteration = self.state.iteration
        reason = self._stop.reason(self.run.config.training, self.run.context, iteration)
        if reason is not None:
            self.run.reporter.say(f" exiting at iteration {iteration}: {reason}")
        return reason is not None

    def _release_teacher_when_due(self) -> None:
        """At S_stop drop the teacher everywhere; its ranks give its memory back."""
        alignment = self.run.alignment
        if alignment is None or alignment.is_released:
            return
        if alignment.objective.schedule.is_active_at(self.state.iteration):
            return
        alignment.release()
        self._release_timer.release(self.state.iteration)
