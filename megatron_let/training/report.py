"""Turn an interval's totals into a row and hand it to the log, metrics.jsonl, TensorBoard and W&B."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_let.config.run_config import RunConfig
from megatron_let.log import LOGGER
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.planning.flops import peak_flops, training_flops_per_token
from megatron_let.training.alignment import AlignmentReport
from megatron_let.training.bad_numbers import StepOutcome
from megatron_let.training.dashboards import open_dashboards
from megatron_let.training.metrics import (
    METRICS_FILE,
    JsonLines,
    Sink,
    TrainingRow,
    ValidationRow,
    format_training_row,
    format_validation_row,
)
from megatron_let.training.patient_sink import PatientSink
from megatron_let.training.state import TrainingState


class IntervalTotals:
    """What has added up since the last log line."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Forget everything: a new interval begins."""
        self.loss = torch.zeros(2, dtype=torch.float64, device=self._device)  # [sum, count]
        self.iterations = 0
        self.samples = 0
        self.seconds = 0.0
        self.forward_backward_seconds = 0.0
        self.optimizer_seconds = 0.0
        self.batch_size = 0
        self.grad_norm: float | None = None
        self.num_zeros: int | None = None

    def add(
        self,
        losses: list[torch.Tensor],
        outcome: StepOutcome,
        batch_size: int,
        seconds: float,
    ) -> None:
        """Add one iteration: its microbatches' [sum, count] (none of a bad one), its step, size and time."""
        for loss in losses:
            self.loss += loss
        self.iterations += 1
        self.samples += batch_size
        self.seconds += seconds
        self.batch_size = batch_size
        self.grad_norm = None if outcome.grad_norm is None else float(outcome.grad_norm)
        self.num_zeros = None if outcome.num_zeros is None else int(outcome.num_zeros)

    def add_phases(self, *, forward_backward: float, optimizer: float) -> None:
        """Add the seconds that the two phases of one iteration took."""
        self.forward_backward_seconds += forward_backward
        self.optimizer_seconds += optimizer


class ReleaseTimer:
    """Iteration times on either side of the teacher's release, for the one line that compares their medians."""

    _WINDOW = 10

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=self._WINDOW)
        self._before: float | None = None
        self._iteration = 0

    def add(self, seconds: float) -> None:
        """Add an iteration."""
        self._seconds.append(seconds)

    def release(self, iteration: int) -> None:
        """Note that the teacher left after `iteration` iterations."""
        if self._seconds:  # a run resumed right here has nothing to compare
            self._before, self._iteration = statistics.median(self._seconds), iteration
            self._seconds.clear()

    def line(self, *, is_last: bool) -> str | None:
        """Return the line once enough iterations have followed, or the last one has; None at any other time."""
        if self._before is None or not (is_last or len(self._seconds) == self._WINDOW):
            return None
        before, self._before = self._before, None
        return (
            f" LET teacher released at iteration {self._iteration}: iteration time {before * 1e3:.1f} ms before, "
            f"{statistics.median(self._seconds) * 1e3:.1f} ms after"
        )


@dataclass(frozen=True)
class Reporter:
    """The one rank that speaks: rank 0 writes, the others do nothing."""

    config: RunConfig
    context: ParallelContext
    sinks: tuple[Sink, ...]
    flops_per_token: float
    peak: float | None

    def say(self, text: str) -> None:
        """Print a line, once for the whole run."""
        LOGGER.info(text)

    def training(
        self,
        state: TrainingState,
        totals: IntervalTotals,
        *,
        lm_loss: float,
        let_report: AlignmentReport | None,
        let_weight: float | None,
        learning_rate: float,
        loss_scale: float,
        total_iterations: int,
        samples_left: int,
        params_norm: float | None,
    ) -> None:
        """Report one logged iteration; all ranks bring the same reduced numbers."""
        if self.context.rank != 0:
            return
        tokens_per_second = totals.samples * self.config.model.seq_length / totals.seconds
        flops = tokens_per_second * self.flops_per_token / self.context.world_size
        row = TrainingRow(
            iteration=state.iteration,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            lm_loss=lm_loss,
            let_loss=None if let_report is None else let_report.loss,
            let_cosine=None if let_report is None else let_report.cosine,
            let_cosine_centered=None if let_report is None else let_report.centred_cosine,
            let_weight=let_weight,
            grad_norm=totals.grad_norm,
            num_zeros_in_grad=totals.num_zeros if self.config.optimizer.log_num_zeros_in_grad else None,
            params_norm=params_norm,
            learning_rate=learning_rate,
            global_batch_size=totals.batch_size,
            loss_scale=loss_scale,
            skipped_iterations=state.skipped_iterations,
            nan_iterations=state.nan_iterations,
            iteration_ms=totals.seconds / totals.iterations * 1e3,
            tokens_per_second=tokens_per_second,
            tokens_per_second_per_device=tokens_per_second / self.context.world_size,
            tflops_per_device=flops / 1e12,
            mfu=None if self.peak is None else flops / self.peak,
            elapsed_seconds=state.elapsed_seconds,
            **self._memory(),
            **self._timers(totals),
        )
        eta = samples_left * totals.seconds / totals.samples  # iterations of a ramp-up grow
        LOGGER.info(format_training_row(row, train_iters=total_iterations, eta_seconds=eta))
        for sink in self.sinks:
            sink.write(row)

    def _memory(self) -> dict[str, int]:
        """Return what PyTorch holds of this GPU's memory, where it is asked for and there is one."""
        if not (self.config.logging.log_memory_to_tensorboard and self.context.is_on_gpu):
            return {}
        return {
            "memory_reserved_bytes": torch.cuda.memory_reserved(),
            "memory_allocated_bytes": torch.cuda.memory_allocated(),
            "memory_max_allocated_bytes": torch.cuda.max_memory_allocated(),
        }

    def _timers(self, totals: IntervalTotals) -> dict[str, Any]:
        """Return the milliseconds of an iteration's phases, where they are asked for."""
        if not self.config.logging.log_timers_to_tensorboard:
            return {}
        return {
            "forward_backward_ms": totals.forward_backward_seconds / totals.iterations * 1e3,
            "optimizer_ms": totals.optimizer_seconds / totals.iterations * 1e3,
        }

    def validation(self, state: TrainingState, loss: float) -> None:
        """Report one evaluation; all ranks bring the same reduced loss."""
        if self.context.rank != 0:
            return
        row = ValidationRow(
            iteration=state.iteration,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            validation_lm_loss=loss,
            elapsed_seconds=state.elapsed_seconds,
        )
        LOGGER.info(format_validation_row(row))
        for sink in self.sinks:
            sink.write(row)

    def close(self) -> None:
        """Flush every sink."""
        for sink in self.sinks:
            sink.close()


def _sinks(config: RunConfig, resumed_iteration: int, total_iterations: int) -> list[Sink]:
    """Open what the rows go to; the file of an earlier part of the run is touched last, when nothing else can fail."""
    sinks: list[Sink] = [*open_dashboards(config, resumed_iteration)]
    if config.checkpoint.save is not None:
        is_trained = config.validation.skip_train or resumed_iteration >= total_iterations
        directory = Path(config.checkpoint.save)
        rows = JsonLines(directory, resumed_iteration=resumed_iteration, validates_at_once=is_trained)
        sinks.append(PatientSink(f"{directory / METRICS_FILE}", rows))
    return sinks


def build_reporter(
    config: RunConfig,
    context: ParallelContext,
    *,
    padded_vocab_size: int,
    resumed_iteration: int,
    total_iterations: int,
) -> Reporter:
    """Open the sinks of rank 0 and look up what speed is held against.

    Raises:
        ConfigError: a sink cannot be opened.
    """
    sinks = context.together(
        lambda: _sinks(config, resumed_iteration, total_iterations) if context.rank == 0 else []
    )
    if config.logging.log_memory_to_tensorboard and not context.is_on_gpu:
        LOGGER.warning("--log-memory-to-tensorboard has no effect: there is no GPU")
    device_name = torch.cuda.get_device_name(context.device) if context.is_on_gpu else ""
    return Reporter(
        config,
        context,
        tuple(sinks),
        training_flops_per_token(config, padded_vocab_size),
        peak_flops(device_name),
    )
