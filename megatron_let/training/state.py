"""The one object that changes while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingState:
    """Progress of a run; everything here goes into the checkpoint."""

    iteration: int = 0
    """Attempted iterations, skipped ones included."""

    consumed_samples: int = 0
    """Training sequences read, which is also the position in the data."""

    consumed_tokens: int = 0
    """Tokens of these, each sequence with the length it was read with."""

    skipped_iterations: int = 0
    """Iterations without an optimizer step: gradient overflow under fp16, NaN or infinity."""

    nan_iterations: int = 0
    """Iterations with NaN or infinity in the loss or a gradient; fp16's overflows are none while its scale can fall."""

    elapsed_seconds: float = 0.0
    """Time spent training, evaluation and saving left out."""
