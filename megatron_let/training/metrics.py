"""The numbers of a run: one log line, one JSON row. TensorBoard and W&B, which get the same names: `dashboards.py`."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from megatron_let.regular_files import MIB, read_text
from megatron_let.training.checkpoint_files import write_atomically

METRICS_FILE = "metrics.jsonl"
_LARGEST = 4096 * MIB


@dataclass(frozen=True)
class TrainingRow:
    """One logged iteration; losses are token-weighted over the iterations since the last row.

    let_* are None where no teacher ran. `let_weight` is the weight the iteration was trained with.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    lm_loss: float
    let_loss: float | None
    let_cosine: float | None
    let_cosine_centered: float | None
    let_weight: float | None
    grad_norm: float | None
    num_zeros_in_grad: int | None
    params_norm: float | None
    learning_rate: float
    global_batch_size: int
    loss_scale: float
    skipped_iterations: int
    nan_iterations: int
    iteration_ms: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    tflops_per_device: float
    mfu: float | None
    elapsed_seconds: float
    memory_reserved_bytes: int | None = None
    memory_allocated_bytes: int | None = None
    memory_max_allocated_bytes: int | None = None
    forward_backward_ms: float | None = None
    optimizer_ms: float | None = None


@dataclass(frozen=True)
class ValidationRow:
    """One evaluation; `elapsed_seconds` is training time since the run began, evaluation and saving left out."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    validation_lm_loss: float
    elapsed_seconds: float


Row = TrainingRow | ValidationRow


class Sink(Protocol):
    """Somewhere rows go."""

    def write(self, row: Row) -> None:
        """Write one row, all of it, or raise OSError and leave nothing of it."""

    def close(self) -> None:
        """Flush and let go."""


class JsonLines:
    """`metrics.jsonl` in the save directory, one JSON object a row."""

    def __init__(self, directory: Path, *, resumed_iteration: int, validates_at_once: bool = False) -> None:
        """Open the file; a run with nothing left to train (`validates_at_once`) makes its last validation anew."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        if path.exists():
            drop_rows_past(path, resumed_iteration, keep_validation=not validates_at_once)
        self._file = path.open("ab", buffering=0)

    def write(self, row: Row) -> None:
        """Append the row at once, so that a killed run loses at most the line being written."""
        line = json.dumps({key: _json_number(value) for key, value in asdict(row).items()}) + "\n"
        left, start = line.encode(), self._file.seek(0, os.SEEK_END)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(start)  # a full disk may have taken a part
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def drop_rows_past(path: Path, iteration: int, *, keep_validation: bool = True) -> None:
    """Rewrite a metrics file atomically without torn lines and without rows after `iteration`.

    With `keep_validation` False the validation at `iteration` goes too.
    """
    kept = []
    for line in read_text(path, errors="replace", limit=_LARGEST).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            not (isinstance(row, dict) and isinstance(row.get("iteration"), int))
            or row["iteration"] > iteration
        ):
            continue
        if keep_validation or row["iteration"] < iteration or "validation_lm_loss" not in row:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept))


def _json_number(value: Any) -> Any:
    # JSON has no NaN or infinity; a reader gets the word.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def format_training_row(row: TrainingRow, *, train_iters: int, eta_seconds: float) -> str:
    """Return Megatron's log line, then LET's columns, rates and the time left.

    Losses are printed whatever their sign and also when they are not a number.
    """
    columns = [
        f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {row.iteration:8d}/{train_iters:8d}",
        f"consumed samples: {row.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {row.iteration_ms:.1f}",
        f"learning rate: {row.learning_rate:.6E}",
        f"global batch size: {row.global_batch_size:5d}",
        f"lm loss: {row.lm_loss:.6E}",
        f"loss scale: {row.loss_scale:.1f}",
        f"grad norm: {'n/a' if row.grad_norm is None else f'{row.grad_norm:.3f}'}",
        *([] if row.num_zeros_in_grad is None else [f"num zeros: {row.num_zeros_in_grad}"]),
        *([] if row.params_norm is None else [f"params norm: {row.params_norm:.3f}"]),
        f"number of skipped iterations: {row.skipped_iterations:3d}",
        f"number of nan iterations: {row.nan_iterations:3d}",
    ]
    if row.let_cosine is not None:
        columns.append(f"let cosine: {row.let_cosine:.4f}")
    if row.let_weight is not None:
        columns.append(f"let weight: {row.let_weight:.4g}")
    columns.append(f"tokens/s/device: {row.tokens_per_second_per_device:.0f}")
    columns.append(f"TFLOP/s/device: {row.tflops_per_device:.3g}")
    if row.mfu is not None:
        columns.append(f"MFU: {row.mfu:.1%}")
    columns.append(f"ETA: {timedelta(seconds=round(eta_seconds))}")
    return " | ".join(columns) + " |"


def format_validation_row(row: ValidationRow) -> str:
    """Return Megatron's validation line."""
    perplexity = math.exp(min(20.0, row.validation_lm_loss))
    return (
        f" validation loss at iteration {row.iteration} | lm loss value: {row.validation_lm_loss:.6E} | "
        f"lm loss PPL: {perplexity:.6E} |"
    )
