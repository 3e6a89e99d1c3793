"""NaN and infinity in one iteration: nothing steps, the place is named, the run goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, numbers, training_rows
from tests.training.injected import Fault, Told, train_with

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2-distributed": {"--use-distributed-optimizer": None},
    "dp2-overlap": {
        "--use-distributed-optimizer": None,
        "--overlap-grad-reduce": None,
        "--overlap-param-gather": None,
        "--ddp-bucket-size": 10_000,
    },
    "tp2-sp": {"--tensor-model-parallel-size": 2, "--sequence-parallel": None},
    "pp2": {"--pipeline-model-parallel-size": 2},
    "pp2-vp2": {"--pipeline-model-parallel-size": 2, "--num-virtual-stages-per-pipeline-rank": 2},
}
PLAIN: dict[str, Any] = {"--mock-data": None, "--train-iters": 5}
WEIGHT = "decoder.layers.1.mlp.linear_fc1.weight"


def run(pool: RankPool, fault: Fault, changes: dict[str, Any], *, world_size: int = 2) -> Told:
    """Run with a fault; return rank 0's account, all ranks having ended alike."""
    told = pool.run(world_size, train_with, arguments(TINY_STUDENT, {**PLAIN, **changes}), fault)
    assert len({(each.code, each.error, tuple(each.iterations)) for each in told}) == 1
    for each in told:
        assert each.is_changed() == told[0].is_changed()
    return told[0]


def assert_skipped(told: Told, iteration: int, *, total: int = 5) -> str:
    """Assert that this iteration alone was skipped; return the line that says so."""
    assert told.code == 0
    assert told.is_changed() == [i != iteration for i in range(1, total + 1)]
    assert [row[0] for row in told.iterations] == list(range(1, total + 1))
    assert [row[1] for row in told.iterations] == [8 * i for i in range(1, total + 1)]
    assert [row[2:] for row in told.iterations] == [(int(i >= iteration),) * 2 for i in range(1, total + 1)]
    (line,) = told.warnings("skipped")
    assert line.startswith(f"WARNING iteration {iteration} skipped: ")
    assert line.endswith("; 1 in a row (at most 10), 1 in all")
    return line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_embedding_is_skipped_and_named(layout: str, pool: RankPool) -> None:
    told = run(pool, Fault("embedding", (3,), microbatch=2), LAYOUTS[layout])
    line = assert_skipped(told, 3)
    count = 4 if layout.startswith("dp2") else 8
    first = "rank 0 (pipeline stage 0, tensor 0, data 0)"
    assert f"lm loss nan, first on {first}, microbatch 3 of {count}; gradient nan in" in line


@pytest.mark.parametrize(
    ("layout", "value"), [*((layout, math.nan) for layout in LAYOUTS), ("dp2", math.inf)]
)
def test_a_bad_gradient_of_one_rank_is_traced_to_rank_and_parameter(
    layout: str, value: float, pool: RankPool
) -> None:
    """Of pipeline stages that have no layer 1 the fault leaves the gradients alone."""
    rank = 0 if layout == "pp2" else 1
    name = (
        WEIGHT
        if layout.startswith(("dp2", "tp2")) or layout == "pp2"
        else "decoder.layers.3.mlp.linear_fc1.weight"
    )
    local = "decoder.layers.0.mlp.linear_fc1.weight" if layout == "pp2-vp2" else WEIGHT
    told = run(pool, Fault("parameter", (2,), rank=rank, value=value, parameter=local), LAYOUTS[layout])
    line = assert_skipped(told, 2)
    more = " and 1 other parameters" if layout == "pp2-vp2" else ""  # one in each virtual stage
    assert f"skipped: gradient {value} in {name}{more} (rank {rank});" in line


@pytest.mark.parametrize("layout", ["dp2", "tp2-sp", "pp2", "pp2-vp2"])
def test_a_gradient_that_goes_bad_on_its_way_back_is_traced_to_stage_and_microbatch(
    layout: str, pool: RankPool
) -> None:
    fault = Fault("backward", (4,), rank=1, microbatch=1)
    line = assert_skipped(run(pool, fault, {**LAYOUTS[layout], "--recompute-activations": None}), 4)
    place = {
        "dp2": "rank 1 (pipeline stage 0, tensor 0, data 1), microbatch 2 of 4",
        "tp2-sp": "rank 0 (pipeline stage 0, tensor 0, data 0), microbatch 2 of 8",  # the sum of both ranks
        "pp2": "rank 1 (pipeline stage 1, tensor 0, data 0), microbatch 2 of 8",
        "pp2-vp2": "rank 1 (pipeline stage 1, tensor 0, data 0), microbatch 2 of 8",
    }[layout]
    assert f"gradient nan, first on {place}; gradient nan in" in line


def test_full_recompute_does_not_hide_the_microbatch(pool: RankPool) -> None:
    recompute = {
        "--recompute-granularity": "full",
        "--recompute-method": "uniform",
        "--recompute-num-layers": 1,
    }
    line = assert_skipped(run(pool, Fault("backward", (2,), rank=1, microbatch=3), recompute), 2)
    assert "gradient nan, first on rank 1 (pipeline stage 0, tensor 0, data 1), microbatch 4 of 4" in line


@pytest.mark.parametrize("layout", ["pp2", "pp2-vp2"])
def test_a_microbatch_that_goes_bad_on_the_second_stage_is_found_there(layout: str, pool: RankPool) -> None:
    line = assert_skipped(run(pool, Fault("output", (3,), rank=1, microbatch=5), LAYOUTS[layout]), 3)
    assert "lm loss nan, first on rank 1 (pipeline stage 1, tensor 0, data 0), microbatch 6 of 8" in line


@pytest.mark.parametrize(("layout", "clip"), [("dp2", 0.0), ("dp2-overlap", 1.0), ("pp2", 0.0), ("pp2", 1.0)])
def test_an_overflow_in_the_norm_alone_never_steps(layout: str, clip: float, pool: RankPool) -> None:
    """Two gradients of 1.5e19: their squares are numbers in fp32, the sum of them is none."""
    fault = Fault("parameter", (3,), microbatch=0, value=1.5e19, parameter="linear_proj.weight")
    told = run(pool, fault, {**LAYOUTS[layout], "--clip-grad": clip, "--log-interval": 1})
    line = assert_skipped(told, 3)
    assert "skipped: gradient norm inf, though every single gradient is finite;" in line


@pytest.mark.parametrize("layout", ["dp2", "dp2-distributed"])
def test_an_infinity_that_arises_in_the_sum_over_ranks_is_found(layout: str, pool: RankPool) -> None:
    """fp16 ends at 65,504: 40,000 on each of two ranks is below it, their sum is not."""
    fault = Fault("parameter", (3,), microbatch=0, value=4e4, parameter=WEIGHT)
    half = {"--fp16": None, "--loss-scale": 1, "--calculate-per-token-loss": None}
    line = assert_skipped(run(pool, fault, {**LAYOUTS[layout], **half}), 3)
    assert f"skipped: gradient inf in {WEIGHT}, only in the sum over ranks" in line


def test_rows_show_the_count_and_leave_bad_losses_out(pool: RankPool, tmp_path: Path) -> None:
    fault, changes = Fault("embedding", (3, 4)), {"--save": tmp_path, "--log-interval": 3, "--train-iters": 6}
    told = run(pool, fault, changes)
    assert told.is_changed() == [True, True, False, False, True, True]
    rows = training_rows(tmp_path)
    assert [row["nan_iterations"] for row in rows] == [1, 2]
    assert [row["skipped_iterations"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["lm_loss"]) for row in rows)  # the mean of the good ones
    assert rows[0]["grad_norm"] is None  # the last iteration had none
    assert math.isfinite(rows[1]["grad_norm"])
    line = next(line for line in told.lines if "iteration        6/" in line)
    assert "number of skipped iterations:   2 | number of nan iterations:   2 |" in line


@pytest.mark.parametrize("layout", ["dp2", "pp2-vp2"])
def test_without_the_check_a_run_goes_on_with_what_it_has(layout: str, pool: RankPool) -> None:
    off = {**LAYOUTS[layout], "--no-check-for-nan-in-loss-and-grad": None, "--log-interval": 5}
    told = run(pool, Fault("embedding", (3,)), off)
    assert told.code == 0
    assert told.is_changed() == [True] * 5
    assert told.warnings("") == []
    assert [row[3] for row in told.iterations] == [0, 0, 1, 2, 3]  # the weights are lost, and it is counted


@pytest.mark.parametrize("layout", ["dp2-overlap", "pp2-vp2", "tp2-sp"])
def test_the_checks_change_no_number_of_a_good_run(layout: str, pool: RankPool, tmp_path: Path) -> None:
    states = []
    for name, switch in (("on", {}), ("off", {"--no-check-for-nan-in-loss-and-grad": None})):
        told = run(pool, Fault("nowhere", ()), {**LAYOUTS[layout], **switch, "--save": tmp_path / name})
        assert told.warnings("") == []
        states.append(told.states)
    assert states[0] == states[1]
    assert numbers(tmp_path / "on") == numbers(tmp_path / "off")
