"""What is a spike and what is not; and that a run says so."""

from __future__ import annotations

import math
import random

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.training.loss_spikes import WARM_UP, WINDOW, LossSpikes
from tests.training.injected import Fault
from tests.training.test_bad_numbers import run


def told(losses: list[float]) -> list[int]:
    """Return at which of these losses a spike is told, counted from 0."""
    spikes = LossSpikes()
    return [index for index, loss in enumerate(losses) if spikes.add(loss) is not None]


def noisy(count: int, level: float = 3.0, noise: float = 0.05) -> list[float]:
    source = random.Random(5)
    return [source.gauss(level, noise) for _ in range(count)]


def test_a_loss_far_above_its_level_is_told_once_while_it_lasts_and_anew_after_it() -> None:
    losses = noisy(150)
    for index in (60, 61, 62, 100):
        losses[index] = 5.0
    assert told(losses) == [60, 100]


def test_noise_the_fall_early_in_training_and_small_steps_are_no_spikes() -> None:
    assert told(noisy(2000)) == []
    assert told([10 * math.exp(-i / 100) + 3 + noise for i, noise in enumerate(noisy(600, 0.0))]) == []
    assert told([3.0] * 50 + [3.1] * 5) == []  # within 5 %, however still the loss stood before
    assert told([3.0] * 50 + [3.2] + [3.0] * 5) == [50]


def test_nothing_is_a_spike_before_the_warm_up() -> None:
    assert told([3.0] * (WARM_UP - 1) + [30.0]) == []
    assert told([3.0] * WARM_UP + [30.0]) == [WARM_UP]


def test_a_new_level_is_told_once_and_becomes_the_measure() -> None:
    assert told([3.0] * WINDOW + [5.0] * WINDOW + [6.0]) == [WINDOW, 2 * WINDOW]


def test_the_words_hold_loss_level_and_limit() -> None:
    spikes = LossSpikes()
    for _ in range(40):
        spikes.add(2.0)
    assert spikes.add(4.0) == (
        "lm loss 4.000000E+00 is far above the median 2.000000E+00 of the last 40 iterations (a spike begins above "
        "2.100000E+00)"
    )


@pytest.mark.parametrize(
    "flag", [{}, {"--pipeline-model-parallel-size": 2}, {"--tensor-model-parallel-size": 2}]
)
def test_a_run_tells_its_spike_and_goes_on(flag: dict[str, int], pool: RankPool) -> None:
    """The loss of one iteration is larger by 10."""
    fault = Fault("spike", (24,), value=10.0)
    seen = run(pool, fault, {**flag, "--train-iters": 26, "--global-batch-size": 2})
    assert (seen.code, seen.iterations[-1][3]) == (0, 0)
    (line,) = seen.warnings("spike")
    assert line.startswith("WARNING loss spike at iteration 24: lm loss ")
