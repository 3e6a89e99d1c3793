"""Tell a loss that jumps from one that wanders."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 100
"""Iterations that a loss is held against."""

WARM_UP = 20
"""Iterations that must have been seen before anything is a spike."""

DEVIATIONS = 8.0
"""How many deviations above the median a spike begins."""

SMALLEST_RISE = 0.05
"""A spike is at least this share of the median above it, however still the loss stood before."""

# The median absolute deviation of a normal distribution times this is its standard deviation.
_TO_STANDARD_DEVIATION = 1.4826


class LossSpikes:
    """Watches the loss of every iteration; a spike is told once, when it begins.

    A loss is a spike when it is more than `DEVIATIONS` deviations (median absolute deviation, as a standard deviation)
    and more than `SMALLEST_RISE` of the median above the median of the last `WINDOW` iterations. Neither moves with a
    few spikes in the window. The fall of the loss early in training widens the deviation and lifts the median, so it
    raises no alarm. Begins anew with every start of the program.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._is_spiking = False

    def add(self, loss: float) -> str | None:
        """Take an iteration's finite loss; return the words for the log when a spike begins with it."""
        text, was_spiking = None, self._is_spiking
        self._is_spiking = False
        if len(self._losses) >= WARM_UP:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(each - median) for each in self._losses)
            rise = max(DEVIATIONS * _TO_STANDARD_DEVIATION * deviation, SMALLEST_RISE * abs(median))
            self._is_spiking = loss > median + rise
            if self._is_spiking and not was_spiking:
                text = (
                    f"lm loss {loss:.6E} is far above the median {median:.6E} of the last {len(self._losses)} "
                    f"iterations (a spike begins above {median + rise:.6E})"
                )
        self._losses.append(loss)
        return text
