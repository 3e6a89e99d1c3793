"""Learning rates after a resume: whose they are, the checkpoint's or the command line's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.derive import resolve
from megatron_let.mcore.parallel import parallel_context
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    assert_bitwise,
    numbers,
    refusal,
    train,
    training_rows,
)
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.signals import StopRequest

OVERRIDE = {"--override-opt_param-scheduler": None}
USE_CHECKPOINT = {"--use-checkpoint-opt_param-scheduler": None}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "bf16": (1, {"--bf16": None}),
    "pp2": (2, {"--pipeline-model-parallel-size": 2}),
    "dp2-distributed-optimizer": (2, {"--use-distributed-optimizer": None}),
}
DECOUPLED = {"--decoupled-lr": 1e-3, "--decoupled-min-lr": 1e-4}


@pytest.fixture
def base(token_files: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a run with a linear decay over ten iterations that resumes from its own directory."""
    directory = tmp_path / "run"
    return {
        "--data-path": token_files,
        "--lr": 8e-3,
        "--min-lr": 1e-3,
        "--lr-decay-style": "linear",
        "--lr-decay-iters": 10,
        "--save": directory,
        "--load": directory,
    }


def linear(largest: float, smallest: float, iteration: int) -> float:
    return smallest + (largest - smallest) * (1 - iteration / 10)


def group_rates(argv: list[str]) -> list[tuple[bool, float]]:
    """Build a run, loading its checkpoint, and return whether each parameter group is decoupled, and its rate."""
    config = resolve(parse_arguments(argv), int(os.environ.get("WORLD_SIZE", "1")))
    with parallel_context(config) as context:
        optimizer = build_trainer(config, context, StopRequest()).run.parts.optimizer
        assert optimizer is not None
        groups = [group for group in optimizer.param_groups if group["params"]]
        return sorted((group["is_decoupled_lr"], group["lr"]) for group in groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_override_the_command_lines_rates_win(
    layout: str, base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    pool.run(world_size, train, arguments(TINY_STUDENT, {**base, **flags, "--exit-interval": 2}))
    new = {**base, **flags, **OVERRIDE, "--lr": 4e-3, "--min-lr": 5e-4}
    pool.run(world_size, train, arguments(TINY_STUDENT, new))
    rates = [row["learning_rate"] for row in training_rows(tmp_path / "run")]
    expected = [linear(8e-3, 1e-3, n) for n in (1, 2)] + [linear(4e-3, 5e-4, n) for n in (3, 4, 5)]
    assert rates == pytest.approx(expected, rel=1e-9)  # Python's arithmetic on both sides


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"--lr": 4e-3}, "max lr is 0.004 but the checkpoint was trained with 0.008"),
    "min-lr": ({"--min-lr": 0}, "min lr is 0.0 but the checkpoint was trained with 0.001"),
    "warm-up": ({"--lr-warmup-init": 1e-3}, "init lr is 0.001 but the checkpoint was trained with 0.0"),
    "decoupled-lr": ({"--decoupled-lr": 2e-3}, "decoupled lr is 0.002 but the checkpoint was trained with 0.001"),
    "decoupled-min-lr": ({"--decoupled-min-lr": 0}, "decoupled min lr is 0.0 but the checkpoint was trained with 0.0001"),
    "nothing decoupled": (
        {"--decoupled-lr": False, "--decoupled-min-lr": False},
        "--decoupled-lr is None but",
    ),
}  # fmt: skip


def test_a_changed_rate_is_refused_by_name_without_override(base: dict[str, Any], pool: RankPool) -> None:
    own = {**base, **DECOUPLED}
    pool.run(1, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 1}))
    for changes, expected in CHANGES.values():
        (message,) = pool.run(1, refusal, arguments(TINY_STUDENT, {**own, **changes}))
        assert message is not None, changes
        assert expected in message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_decoupled_rate_stays_that_of_embedding_and_output_layer(
    layout: str, base: dict[str, Any], pool: RankPool
) -> None:
    world_size, flags = LAYOUTS[layout]
    own = {**base, **flags, **DECOUPLED}
    for rates in pool.run(world_size, group_rates, arguments(TINY_STUDENT, own)):
        assert set(rates) == {(False, 8e-3), (True, 1e-3)}
    pool.run(world_size, train, arguments(TINY_STUDENT, {**own, "--exit-interval": 2}))
    resumed = {False: linear(8e-3, 1e-3, 2), True: linear(1e-3, 1e-4, 2)}
    overridden = {False: linear(8e-3, 1e-3, 2), True: linear(2e-3, 1e-4, 2)}
    new = {**own, "--decoupled-lr": 2e-3}
    for words, expected in (
        (own, resumed),
        ({**new, **OVERRIDE}, overridden),
        ({**new, **USE_CHECKPOINT}, resumed),
    ):
        for rates in pool.run(world_size, group_rates, arguments(TINY_STUDENT, words)):
            assert {is_decoupled for is_decoupled, _ in rates} == {False, True}
            for is_decoupled, rate in rates:
                assert rate == pytest.approx(expected[is_decoupled], rel=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resume_with_a_decoupled_rate_is_bitwise(
    layout: str, base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    own = {**base, **flags, **DECOUPLED}
    whole = {**own, "--save": tmp_path / "whole", "--load": False}
    pool.run(world_size, train, arguments(TINY_STUDENT, whole))
    for extra in ({"--exit-interval": 2}, {}):
        pool.run(world_size, train, arguments(TINY_STUDENT, {**own, **extra}))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "run")
    assert_bitwise(tmp_path / "whole", tmp_path / "run", 5)


def test_the_checkpoints_whole_schedule_is_taken_when_asked_for(
    base: dict[str, Any], pool: RankPool, tmp_path: Path
) -> None:
    wsd = {
        "--lr-decay-style": "WSD",
        "--lr-decay-iters": 5,
        "--lr-wsd-decay-iters": 4,
        "--lr-wsd-decay-style": "linear",
    }
    pool.run(1, train, arguments(TINY_STUDENT, {**base, **wsd, "--exit-interval": 2}))
    other = {**base, **USE_CHECKPOINT, "--lr": 1, "--lr-decay-style": "constant"}
    pool.run(1, train, arguments(TINY_STUDENT, other))
    rates = [row["learning_rate"] for row in training_rows(tmp_path / "run")]
    # 8e-3 until iteration 1, then linear to 1e-3 over four
    assert rates == pytest.approx([8e-3, 6.25e-3, 4.5e-3, 2.75e-3, 1e-3], rel=1e-9)
