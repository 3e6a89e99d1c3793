"""NaN again and again, or out of the teacher: the run ends with code 4 and keeps its last good state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    assert_bitwise,
    numbers,
    stored_tensors,
    train,
)
from tests.processes import HANG_SECONDS
from tests.training.bad_input import assert_readable, refusal
from tests.training.injected import Fault, train_with
from tests.training.test_bad_numbers import LAYOUTS, PLAIN, assert_skipped, run

LET: dict[str, Any] = {"--let-weight": 1.0, "--let-student-layer": 2, "--let-stop-iters": 5}


@pytest.fixture
def let(teacher: Path) -> dict[str, Any]:
    """Return the flags of LET on layer 2."""
    return {**LET, "--let-teacher-load": teacher}


def saved_state(directory: Path, iteration: int) -> dict[str, Any]:
    """Return the training state in a checkpoint."""
    from megatron_let.mcore.checkpoint import RUN, load_common

    state: dict[str, Any] = load_common(directory / f"iter_{iteration:07d}")[RUN]["state"]
    return state


@pytest.mark.parametrize("layout", ["dp2-overlap", "pp2"])
def test_n_in_a_row_end_the_run_with_its_last_good_state_which_resumes(
    layout: str, pool: RankPool, token_files: Path, tmp_path: Path
) -> None:
    """The data of the bad iterations are met again: what comes of them then is what an unbroken run makes of them."""
    base = {"--mock-data": False, "--data-path": token_files, "--train-iters": 7, **LAYOUTS[layout]}
    base["--ddp-bucket-size"] = False  # one bucket
    good, bad = tmp_path / "good", tmp_path / "bad"
    pool.run(2, train, arguments(TINY_STUDENT, {**base, "--save": good, "--save-interval": 4}))
    broken = {**base, "--save": bad, "--max-skipped-iterations": 3, "--save-interval": 6}
    told = run(pool, Fault("embedding", (2, 5, 6, 7)), broken)
    unspoilt = run(pool, Fault("embedding", (5, 6, 7)), {**broken, "--save": tmp_path / "bad2"})
    for each, first in ((told, 2), (unspoilt, 5)):
        assert each.code == 4
        assert each.is_changed() == [i not in (first, 5, 6, 7) for i in range(1, 8)]
        assert_readable(each.error)
        assert each.error.startswith(
            "3 iterations in a row up to 7 had NaN or infinity (--max-skipped-iterations), "
        )
        assert "lm loss nan, first on rank 0" in each.error
        assert (
            "the last good state is in the checkpoint of iteration 4; training samples 32 to 55" in each.error
        )
    # iteration 6 was in the bad stretch: its checkpoint is the last good one, and the end adds none
    assert sorted(path.name for path in bad.glob("iter_*")) == ["iter_0000004"]
    state = saved_state(bad, 4)
    assert [state[name] for name in ("consumed_samples", "skipped_iterations", "nan_iterations")] == [
        32,
        1,
        1,
    ]
    assert_bitwise(good, tmp_path / "bad2", 4)
    pool.run(
        2,
        train,
        arguments(TINY_STUDENT, {**broken, "--save": tmp_path / "bad2", "--load": tmp_path / "bad2"}),
    )
    assert_bitwise(good, tmp_path / "bad2", 7)
    assert numbers(good) == numbers(tmp_path / "bad2")
    # and the counters go on where they stood
    resumed = run(pool, Fault("embedding", (6,)), {**broken, "--load": bad})
    assert resumed.iterations[-1][2:] == (2, 2)
    assert resumed.warnings("1 in a row (at most 3), 2 in all")


def test_a_good_iteration_in_between_begins_the_count_anew(pool: RankPool) -> None:
    told = run(pool, Fault("embedding", (1, 2, 4, 5)), {"--max-skipped-iterations": 3}, world_size=1)
    assert told.code == 0
    assert told.iterations[-1][2:] == (4, 4)


def test_without_a_good_iteration_or_a_place_nothing_is_saved_and_it_is_said(
    pool: RankPool, tmp_path: Path
) -> None:
    two = {"--max-skipped-iterations": 2, "--save-interval": 1}
    told = run(pool, Fault("embedding", (1, 2)), {**two, "--save": tmp_path}, world_size=1)
    assert told.code == 4
    assert "there is nothing to save: no iteration was good" in told.error
    assert list(tmp_path.glob("iter_*")) == []
    told = run(pool, Fault("embedding", (3, 4)), {**two, "--save-interval": False}, world_size=1)
    assert told.code == 4
    assert "the last good state, of iteration 2, is lost: no --save was given" in told.error


def test_a_poisoned_weight_is_named_and_never_saved(pool: RankPool, tmp_path: Path) -> None:
    """The weights came in like this: no skipped iteration makes them better."""
    changes = {"--max-skipped-iterations": 2, "--save": tmp_path, "--save-interval": 1}
    fault = Fault("weight", (2,), parameter="decoder.layers.2.mlp.linear_fc2.weight", rank=1)
    told, other = pool.run(2, train_with, arguments(TINY_STUDENT, {**PLAIN, **changes}), fault)
    assert (told.code, told.error) == (other.code, other.error)
    name = "the weight decoder.layers.2.mlp.linear_fc2.weight itself holds nan on rank 1 (pipeline stage 0, tensor 0, data 1)"
    assert told.code == 4
    assert name in told.warnings("iteration 2 skipped")[0]
    assert f"nothing is saved, for {name}" in told.error
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]


@pytest.mark.parametrize("layout", ["dp2", "tp2-sp", "pp2-vp2"])
def test_a_bad_teacher_ends_the_run_before_the_student_meets_it(
    layout: str, pool: RankPool, let: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    """One number of one microbatch on one rank, at a position that only this rank's slice holds."""
    rank = 0 if layout == "tp2-sp" else 1
    owner = 0 if layout == "pp2-vp2" else rank
    fault = Fault("teacher", (3,), rank=owner, microbatch=1)
    told = run(pool, fault, {**let, **LAYOUTS[layout], "--save": tmp_path, "--let-student-layer": 1})
    assert told.code == 4
    assert told.is_changed() == [True, True, False]
    place = f"rank {owner} (pipeline stage 0, tensor 0, data {int(layout == 'dp2')}), microbatch 2 of"
    assert f"the teacher {teacher} gave nan at iteration 3 on {place}" in told.error
    assert "the last good state is in the checkpoint of iteration 2" in told.error
    assert_readable(told.error)
    assert all(stored_is_finite(tmp_path, 2))


def stored_is_finite(directory: Path, iteration: int) -> list[bool]:
    """Return for each tensor of a checkpoint whether all of it is finite."""
    return [bool(t.isfinite().all()) for t in stored_tensors(directory / f"iter_{iteration:07d}").values()]


def test_a_teacher_is_judged_at_masked_positions_too(
    pool: RankPool, let: dict[str, Any], token_files: Path
) -> None:
    """Its NaN times a mask of 0 is NaN: it would reach the student's gradient."""
    data = {"--mock-data": False, "--data-path": token_files, "--eod-mask-loss": None}
    told = run(pool, Fault("masked teacher", (2,)), {**let, **data}, world_size=1)
    assert told.code == 4
    assert "gave nan at iteration 2" in told.error


def test_a_teacher_of_zeros_is_no_nan(pool: RankPool, let: dict[str, Any], tmp_path: Path) -> None:
    told = run(pool, Fault("teacher", (2, 3), value=0.0), {**let, "--save": tmp_path}, world_size=1)
    assert told.code == 0
    assert told.warnings("iteration") == []
    assert [row["let_cosine"] == 0 for row in numbers(tmp_path)] == [False, True, True, False, False]
    assert [row["let_loss"] == 0 for row in numbers(tmp_path)] == [False, True, True, False, False]


def test_after_the_stop_and_at_weight_zero_no_teacher_is_asked(pool: RankPool, let: dict[str, Any]) -> None:
    told = run(pool, Fault("teacher", (3, 4, 5)), {**let, "--let-stop-iters": 2}, world_size=1)
    assert (told.code, told.teacher_calls) == (0, 2 * 8)
    told = run(pool, Fault("teacher", (1, 2, 3, 4, 5)), {**let, "--let-weight": 0.0}, world_size=1)
    assert (told.code, told.teacher_calls) == (0, 0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_nan_of_lets_own_is_told_apart_from_the_students(
    what: str, layout: str, pool: RankPool, let: dict[str, Any], tmp_path: Path
) -> None:
    fault = Fault("let", (2,), rank=0, microbatch=1, parameter=what)
    told = run(pool, fault, {**let, **LAYOUTS[layout], "--save": tmp_path})
    line = assert_skipped(told, 2)
    assert (
        "LET loss nan (the lm loss is finite) on rank 0 (pipeline stage 0, tensor 0, data 0), microbatch 2 of"
        in line
    )
    rows = numbers(tmp_path)
    assert [row["let_loss"] is None for row in rows] == [False, True, False, False, False]
    assert rows[1]["lm_loss"] == "nan"  # nothing of a skipped iteration counts


def test_a_students_nan_is_not_blamed_on_let(pool: RankPool, let: dict[str, Any]) -> None:
    line = assert_skipped(run(pool, Fault("embedding", (3,), microbatch=0), let), 3)
    assert "skipped: lm loss nan, first on rank 0 " in line
    assert "LET" not in line


def test_settings_without_effect_and_out_of_range_are_refused(pool: RankPool) -> None:
    plain = {"--mock-data": None}
    off = {"--no-check-for-nan-in-loss-and-grad": None, "--max-skipped-iterations": 5}
    assert refusal(pool, {**plain, **off}, world_size=1).startswith(
        "--max-skipped-iterations cannot take effect"
    )
    assert refusal(pool, {**plain, "--max-skipped-iterations": 0}, world_size=1) == (
        "--max-skipped-iterations is 1 or more, got 0"
    )


def test_the_program_ends_with_code_4_and_says_so_once(tmp_path: Path) -> None:
    """One step of 1e30, and every loss after it is none: a divergence through the real entry point."""
    words = {
        "--mock-data": None,
        "--lr": 1e30,
        "--clip-grad": 0,
        "--max-skipped-iterations": 2,
        "--save": tmp_path,
    }
    command = [sys.executable, "pretrain_let.py", *arguments(TINY_STUDENT, words)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert done.returncode == status["exit_code"] == 4, done.stderr
    assert status["iteration"] == 1
    error = "error: 2 iterations in a row up to 3 had NaN or infinity"
    assert status["message"].startswith(error)
    assert done.stderr.count(error) == 1
    assert "Traceback" not in done.stderr
