"""The weight schedule and the defaults of method.md."""

from __future__ import annotations

import pytest

from megatron_let.errors import ConfigError
from megatron_let.let import LetSchedule, default_student_layer, resolve_stop


def test_weight_falls_linearly_from_w0_to_zero_at_the_stop() -> None:
    schedule = LetSchedule(weight=0.1, stop_iteration=8)
    # exact: one multiplication and one division by a power of two
    assert schedule.weight_at(0) == 0.1
    assert schedule.weight_at(1) == 0.1 * 7 / 8
    assert schedule.weight_at(7) == 0.1 / 8
    assert schedule.weight_at(8) == 0.0
    assert schedule.weight_at(1_000_000) == 0.0


def test_teacher_is_needed_until_the_stop_and_never_at_weight_zero() -> None:
    schedule = LetSchedule(weight=0.1, stop_iteration=8)
    assert [schedule.is_active_at(s) for s in (0, 7, 8, 9)] == [True, True, False, False]
    assert not LetSchedule(weight=0.0, stop_iteration=8).is_active_at(0)


@pytest.mark.parametrize(("weight", "stop"), [(-0.1, 8), (float("nan"), 8), (float("inf"), 8), (0.1, 0)])
def test_impossible_schedules_are_refused(weight: float, stop: int) -> None:
    with pytest.raises(ConfigError, match="must be"):
        LetSchedule(weight=weight, stop_iteration=stop)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, 1), (4, 1), (8, 1), (12, 2), (16, 2), (24, 3), (26, 3), (32, 4)]
)
def test_default_student_layer_is_an_eighth_of_the_depth(num_layers: int, expected: int) -> None:
    assert default_student_layer(num_layers) == expected


def test_stop_is_resolved_to_an_absolute_iteration() -> None:
    assert resolve_stop(1000, stop_iters=None, stop_fraction=None) == 150
    assert resolve_stop(1000, stop_iters=None, stop_fraction=0.5) == 500
    assert resolve_stop(1000, stop_iters=None, stop_fraction=1.0) == 1000
    assert resolve_stop(1000, stop_iters=1, stop_fraction=None) == 1
    assert resolve_stop(1000, stop_iters=1000, stop_fraction=None) == 1000
    assert resolve_stop(2, stop_iters=None, stop_fraction=None) == 1


@pytest.mark.parametrize(
    ("stop_iters", "stop_fraction"),
    [(0, None), (-3, None), (1001, None), (None, 0.0), (None, 1.01), (10, 0.5)],
)
def test_a_stop_outside_the_run_or_given_twice_is_refused(
    stop_iters: int | None, stop_fraction: float | None
) -> None:
    with pytest.raises(ConfigError, match="--let-stop"):
        resolve_stop(1000, stop_iters=stop_iters, stop_fraction=stop_fraction)
