"""The quickstart's figures by hand: where one curve meets the other's end, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickstart_report import (
    Crossing,
    Point,
    draw,
    find_crossing,
    loss_table,
    read_curve,
    step_times,
    verdict,
)


def curve(*losses: float) -> list[Point]:
    """Return validations every 10 iterations that take 2 seconds."""
    return [Point(10 * i, 2.0 * i, loss) for i, loss in enumerate(losses, start=1)]


def test_a_crossing_lies_on_the_line_between_two_validations() -> None:
    assert find_crossing(curve(5.0, 4.0, 3.0), 3.75) == Crossing(iteration=22.5, seconds=4.5)


def test_a_loss_met_exactly_counts_at_its_validation() -> None:
    assert find_crossing(curve(5.0, 4.0, 3.0), 4.0) == Crossing(iteration=20.0, seconds=4.0)


def test_a_loss_below_the_whole_curve_is_not_reached() -> None:
    assert find_crossing(curve(5.0, 4.0, 3.0), 2.9) is None


def test_a_loss_reached_at_the_first_validation_is_reached_there() -> None:
    assert find_crossing(curve(5.0, 4.0), 6.0) == Crossing(iteration=10.0, seconds=2.0)


def test_a_curve_that_comes_down_goes_up_and_comes_down_again_crosses_the_first_time() -> None:
    assert find_crossing(curve(5.0, 3.0, 4.5, 2.0), 4.0) == Crossing(iteration=15.0, seconds=3.0)


def test_a_curve_that_is_no_number_reaches_nothing() -> None:
    assert find_crossing(curve(float("nan"), float("nan")), 4.0) is None


def test_the_last_line_gives_iterations_and_time_as_shares_of_plains() -> None:
    let = [Point(10, 4.0, 3.5), Point(20, 9.0, 2.0)]  # reaches 3.0 a third of the way from 10 to 20
    line = verdict(curve(5.0, 4.0, 3.5, 3.0), let)
    assert line == (
        "LET reaches plain's final validation loss in 33.3% of its iterations and 70.8% of its time"
    )


def test_the_last_line_says_so_when_plain_is_not_reached() -> None:
    line = verdict(curve(5.0, 3.0), curve(5.0, 3.25))
    assert line == "LET does not reach plain's final validation loss (LET 3.250, plain 3.000)"


def test_validations_are_read_in_order_and_a_repeated_one_counts_once() -> None:
    rows: list[dict[str, Any]] = [
        {"iteration": 20, "validation_lm_loss": 3.0, "elapsed_seconds": 4.0},
        {"iteration": 10, "lm_loss": 5.0, "elapsed_seconds": 2.0},
        {"iteration": 10, "validation_lm_loss": 4.0, "elapsed_seconds": 2.0},
        {"iteration": 20, "validation_lm_loss": 3.5, "elapsed_seconds": 4.5},
    ]
    assert read_curve(rows) == [Point(10, 2.0, 4.0), Point(20, 4.5, 3.5)]


def test_the_table_has_a_row_for_each_validation_of_either_run() -> None:
    assert loss_table(curve(5.0, 4.0), [Point(20, 4.0, 3.5), Point(25, 5.0, 3.0)])[2:] == [
        "| 10 | 5.000 |  |  |",
        "| 20 | 4.000 | 3.500 | +0.500 |",
        "| 25 |  | 3.000 |  |",
    ]


def test_step_times_keep_the_iterations_with_and_without_teacher_apart() -> None:
    def row(milliseconds: float, cosine: float | None) -> dict[str, Any]:
        return {"lm_loss": 3.0, "iteration_ms": milliseconds, "let_cosine": cosine}

    plain = [row(900.0, None), row(100.0, None), row(102.0, None), {"validation_lm_loss": 3.0}]
    let = [row(900.0, 0.1), row(110.0, 0.5), row(400.0, None), row(101.0, None)]
    times = step_times(plain, let)
    assert (times.plain, times.with_teacher, times.after_teacher) == (101.0, 110.0, 101.0)
    assert step_times(plain, let[:2]).after_teacher is None


def test_the_picture_can_be_drawn_with_and_without_a_crossing(tmp_path: Path) -> None:
    for name, let in (("crosses.png", curve(4.0, 3.0, 2.0)), ("not.png", curve(6.0, 6.0, 6.0))):
        draw(curve(5.0, 4.0, 3.0), let, 20, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
