"""--exit-duration-in-mins counts from the program's start: imports, data and the loading of a checkpoint included."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_let.entry import RunReport, run_main
from megatron_let.errors import EXIT_DONE, EXIT_PREEMPTED
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, training_rows


def run_program(argv: list[str], seconds_ago: float) -> int:
    """Run pretrain_let.py's own `main` as if the program had started so long ago."""
    import pretrain_let

    with patch.object(sys, "argv", ["pretrain_let.py", *argv]):
        return pretrain_let.main(RunReport(started=time.monotonic() - seconds_ago))


@pytest.mark.parametrize(("seconds_ago", "code", "iterations"), [(0, EXIT_DONE, 5), (61, EXIT_PREEMPTED, 1)])
def test_what_came_before_the_first_iteration_counts(
    seconds_ago: float, code: int, iterations: int, pool: RankPool, tmp_path: Path
) -> None:
    changes = {"--mock-data": None, "--exit-duration-in-mins": 1, "--save": tmp_path}
    assert pool.run(2, run_program, arguments(TINY_STUDENT, changes), seconds_ago) == [code] * 2
    assert len(training_rows(tmp_path)) == iterations


def test_a_programs_clock_starts_before_its_main() -> None:
    reports = []

    def program(report: RunReport) -> int:
        reports.append((time.monotonic(), report.started))
        return 0

    before = time.monotonic()
    run_main(program)
    ((inside, started),) = reports
    assert before <= started <= inside
