"""Learning rates and batch sizes of real runs against formulas written out by hand.

The row of iteration n shows the rate after its step: the value of the schedule at n iterations, which the next one
uses (Megatron-LM logs the same). The first iteration uses the schedule's value at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train, training_rows

MAX, MIN, LENGTH, BATCH = 1e-2, 1e-3, 10, 4
BASE: dict[str, Any] = {
    "--num-layers": 1,
    "--mock-data": None,
    "--micro-batch-size": 4,
    "--global-batch-size": BATCH,
    "--train-iters": LENGTH,
    "--lr": MAX,
    "--min-lr": MIN,
    "--no-save-optim": None,
    "--no-save-rng": None,
}
Formula = Callable[[float], float]


def decayed(coefficient: Formula, *, warmup: float = 0, decay: float = LENGTH, start: float = 0.0) -> Formula:
    """Return rate(n): linear warm-up from `start`, then `coefficient` of the progress in [0, 1], then MIN."""

    def rate(n: float) -> float:
        if n <= warmup and warmup > 0:
            return start + (MAX - start) * n / warmup
        if n > decay:
            return MIN
        return MIN + coefficient((n - warmup) / (decay - warmup)) * (MAX - MIN)

    return rate


def wsd(coefficient: Formula, *, decay: int, length: int) -> Formula:
    """Return rate(n): MAX until the last `length` of `decay` iterations, then `coefficient` of their progress."""

    def rate(n: float) -> float:
        if n <= decay - length:
            return MAX
        return MIN if n > decay else MIN + coefficient((n - decay + length) / length) * (MAX - MIN)

    return rate


def linear(p: float) -> float:
    return 1 - p


def cosine(p: float) -> float:
    return (1 + math.cos(math.pi * p)) / 2


def inverse_square_root(n: float) -> float:
    return MAX * n / 3 if n <= 3 else max(MIN, MAX * math.sqrt(3) / math.sqrt(n))


WSD = {"--lr-decay-style": "WSD", "--lr-decay-iters": 8, "--lr-wsd-decay-iters": 4}
IN_SAMPLES: dict[str, Any] = {"--train-iters": False, "--train-samples": LENGTH * BATCH}
CASES: dict[str, tuple[dict[str, Any], Formula]] = {
    "constant": ({"--lr-decay-style": "constant"}, lambda n: MAX),
    "constant-warmup-init": (
        {"--lr-decay-style": "constant", "--lr-warmup-iters": 4, "--lr-warmup-init": 5e-3},
        lambda n: min(MAX, 5e-3 + 5e-3 * n / 4),
    ),
    "linear-warmup-iters": (
        {"--lr-decay-style": "linear", "--lr-warmup-iters": 3},
        decayed(linear, warmup=3),
    ),
    "cosine-short-decay": ({"--lr-decay-style": "cosine", "--lr-decay-iters": 6}, decayed(cosine, decay=6)),
    "cosine-warmup-fraction": (
        {"--lr-decay-style": "cosine", "--lr-warmup-fraction": 0.25},
        decayed(cosine, warmup=2.5),
    ),
    "cosine-in-samples": (
        {
            **IN_SAMPLES,
            "--lr-decay-style": "cosine",
            "--lr-decay-samples": 32,
            "--lr-warmup-samples": 6,
        },
        decayed(cosine, warmup=1.5, decay=8),
    ),
    "inverse-square-root": (
        {"--lr-decay-style": "inverse-square-root", "--lr-warmup-iters": 3},
        inverse_square_root,
    ),
    "wsd-linear": ({**WSD, "--lr-wsd-decay-style": "linear"}, wsd(linear, decay=8, length=4)),
    "wsd-cosine": ({**WSD, "--lr-wsd-decay-style": "cosine"}, wsd(cosine, decay=8, length=4)),
    "wsd-exponential": (
        {**WSD, "--lr-wsd-decay-style": "exponential"},
        wsd(lambda p: 2 * 0.5**p - 1, decay=8, length=4),
    ),
    "wsd-minus-sqrt": (
        {**WSD, "--lr-wsd-decay-style": "minus_sqrt"},
        wsd(lambda p: 1 - math.sqrt(p), decay=8, length=4),
    ),
}


def run(
    pool: RankPool, directory: Path, changes: dict[str, Any], world_size: int = 1
) -> list[dict[str, Any]]:
    words = arguments(TINY_STUDENT, {**BASE, **changes, "--save": directory})
    pool.run(world_size, train, words)
    return training_rows(directory)


@pytest.mark.parametrize("case", CASES)
def test_the_learning_rate_is_the_formula(case: str, pool: RankPool, tmp_path: Path) -> None:
    changes, formula = CASES[case]
    rows = run(pool, tmp_path, changes)
    assert [row["iteration"] for row in rows] == list(range(1, LENGTH + 1))
    # Python's own arithmetic on both sides: equal but for the order of operations
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [formula(n) for n in range(1, LENGTH + 1)], rel=1e-9
    )


RAMPUP: dict[str, Any] = {
    **IN_SAMPLES,
    "--train-samples": 120,
    "--rampup-batch-size": [4, 4, 24],
    "--global-batch-size": 16,
    "--micro-batch-size": 2,
    "--lr-decay-style": "linear",
    "--lr-decay-samples": 120,
}
# 4 grows to 16 in three steps of 24 / 3 = 8 samples; it is full after more than 24
BATCHES = [4, 4, 8, 12, 16, 16, 16, 16, 16]


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_ramp_up_and_the_rate_counts_samples(world_size: int, pool: RankPool, tmp_path: Path) -> None:
    rows = run(pool, tmp_path, RAMPUP, world_size)
    consumed = [sum(BATCHES[: n + 1]) for n in range(len(BATCHES))]
    assert [row["global_batch_size"] for row in rows] == BATCHES
    assert [row["consumed_samples"] for row in rows] == consumed
    assert [row["consumed_tokens"] for row in rows] == [32 * samples for samples in consumed]
    expected = [MIN + (1 - samples / 120) * (MAX - MIN) for samples in consumed]
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected, rel=1e-9)


def test_a_stop_given_as_a_fraction_counts_the_iterations_after_ramp_up(
    pool: RankPool, teacher: Path, tmp_path: Path
) -> None:
    """9 iterations, of which 0.5 rounds to 4: w(0) to w(3), then no teacher."""
    changes = {
        **RAMPUP,
        "--let-teacher-load": teacher,
        "--let-weight": 1.0,
        "--let-stop-fraction": 0.5,
    }
    weights = [row["let_weight"] for row in run(pool, tmp_path, changes)]
    assert weights[:4] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert weights[4:] == [None] * 5
