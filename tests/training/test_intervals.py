"""A row over several iterations weighs each by its counted tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train, training_rows
from tests.training.observed import counted_tokens

TOTAL, BATCH = 5, 2
# The same fp64 sums, divided once or once an iteration and added up again. A row's cosines are sums in fp32.
ROUNDING = 1e-6
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-process": (1, {}),
    "dp2": (2, {}),
    "tp2-sp": (2, {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}),
    "pp2": (2, {"--pipeline-model-parallel-size": 2}),
}


def weighted(values: list[float], counts: list[int]) -> float:
    """Return the mean of `values` weighted by `counts`."""
    return sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)


@pytest.mark.parametrize(("layout", "stop"), [*((layout, 5) for layout in LAYOUTS), ("one-process", 3)])
def test_five_iterations_in_a_row_are_the_token_weighted_mean_of_five_rows(
    layout: str, stop: int, pool: RankPool, token_files: Path, teacher: Path, tmp_path: Path
) -> None:
    """After S_stop no token is aligned: let_loss is the mean over the iterations before, lm_loss over all."""
    world_size, flags = LAYOUTS[layout]
    base = {
        "--data-path": token_files,
        "--eod-mask-loss": None,
        "--global-batch-size": BATCH,
        "--lr": 0.03,  # the losses of the iterations must differ
        "--let-teacher-load": teacher,
        "--let-weight": 1.0,
        "--let-stop-iters": stop,
        "--let-student-layer": 2,
        **flags,
    }
    for interval in (1, 5):
        words = {**base, "--log-interval": interval, "--save": tmp_path / str(interval)}
        pool.run(world_size, train, arguments(TINY_STUDENT, words))
    of_samples = pool.run(
        1, counted_tokens, arguments(TINY_STUDENT, {**base, **dict.fromkeys(flags, False)})
    )[0]
    counts = [sum(of_samples[i : i + BATCH]) for i in range(0, TOTAL * BATCH, BATCH)]
    each, (whole,) = training_rows(tmp_path / "1"), training_rows(tmp_path / "5")
    for key, length in (("lm_loss", TOTAL), ("let_loss", stop), ("let_cosine", stop)):
        values = [row[key] for row in each[:length]]
        expected = weighted(values, counts[:length])
        assert abs(expected - sum(values) / length) > 100 * ROUNDING, "the data must tell the two means apart"
        assert whole[key] == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)
    assert [row["let_cosine"] for row in each[stop:]] == [None] * (TOTAL - stop)
