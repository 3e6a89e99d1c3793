"""The weight of the alignment loss over a run, and the defaults that LET's paper leaves open.

Source: arXiv 2602.05393, `w(s) = w0 * max(0, (S_stop - s) / S_stop)`; the defaults of S_stop and k are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_let.errors import ConfigError

DEFAULT_STOP_FRACTION = 0.15
"""Share of the run's iterations after which the teacher is released; not published, chosen by us."""


@dataclass(frozen=True)
class LetSchedule:
    """Linear decay of the alignment weight from `weight` at the first iteration to 0 at `stop_iteration`."""

    weight: float
    """w0, the weight of the run's first iteration; finite, 0 or more."""

    stop_iteration: int
    """S_stop, the number of attempted iterations after which the weight is 0; 1 or more."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight < 0:
            raise ConfigError(f"--let-weight {self.weight}: must be a finite number of 0 or more")
        if self.stop_iteration < 1:
            raise ConfigError(
                f"--let-stop-iters {self.stop_iteration}: must be 1 or more with a teacher given"
            )

    def weight_at(self, completed_iterations: int) -> float:
        """Return w(s) for the iteration that follows `completed_iterations` attempted (also skipped) ones."""
        assert completed_iterations >= 0, f"completed iterations cannot be negative: {completed_iterations}"
        remaining = max(0, self.stop_iteration - completed_iterations)
        return self.weight * remaining / self.stop_iteration

    def is_active_at(self, completed_iterations: int) -> bool:
        """Return whether the next iteration needs the teacher, i.e. has a weight above 0."""
        return self.weight_at(completed_iterations) > 0


def default_student_layer(num_layers: int) -> int:
    """Return k, 1-based: `max(1, round(num_layers / 8))`, halves rounded to the even number (12 -> 2, 20 -> 2)."""
    return max(1, round(num_layers / 8))


def resolve_stop(train_iters: int, *, stop_iters: int | None, stop_fraction: float | None) -> int:
    """Return S_stop as an absolute number of iterations, 1 <= S_stop <= `train_iters`.

    Args:
        train_iters: iterations of the whole run, batch ramp-up already resolved.
        stop_iters: --let-stop-iters.
        stop_fraction: --let-stop-fraction, a share of `train_iters`, rounded and at least one iteration.
            With neither given, DEFAULT_STOP_FRACTION.

    Raises:
        ConfigError: both given, or a value outside the run.
    """
    if stop_iters is not None and stop_fraction is not None:
        raise ConfigError("--let-stop-iters and --let-stop-fraction exclude each other: give one of them")
    if stop_iters is not None:
        if not 1 <= stop_iters <= train_iters:
            raise ConfigError(
                f"--let-stop-iters {stop_iters}: must be between 1 and the {train_iters} iterations of the run"
            )
        return stop_iters
    fraction = DEFAULT_STOP_FRACTION if stop_fraction is None else stop_fraction
    if not 0 < fraction <= 1:
        raise ConfigError(f"--let-stop-fraction {fraction}: must be above 0 and at most 1")
    return max(1, round(fraction * train_iters))
