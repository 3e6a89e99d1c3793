"""The fault drills: twenty of them on real jobs, and proof that a drill which goes wrong is not passed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fault_drill import Drills, table
from fault_drill_child import SAVE_STEPS
from fault_drill_plan import Drill, plan

from megatron_let.errors import EXIT_CRASH, EXIT_PREEMPTED

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fault_drill.py"


def test_a_short_plan_has_every_kind_but_the_one_that_waits_a_minute_and_a_long_one_has_that_too() -> None:
    short = {drill.kind for drill in plan(20, seed=1, can_mount=True)}
    long = {drill.kind for drill in plan(100, seed=1, can_mount=True)}
    assert long - short == {"a rank that stands still"}
    assert len(long) >= 15
    assert {"full disk", "read-only directory"}.isdisjoint(
        drill.kind for drill in plan(100, seed=1, can_mount=False)
    )


def test_a_plan_depends_on_its_seed_alone_and_a_long_one_goes_through_every_step_of_a_save() -> None:
    names = [drill.name for drill in plan(50, seed=1, can_mount=True)]
    assert [drill.name for drill in plan(20, seed=1, can_mount=True)] == names[:20]
    assert [drill.name for drill in plan(50, seed=2, can_mount=True)] != names
    places = {drill.fault.place for drill in plan(100, seed=1, can_mount=True) if drill.fault is not None}
    assert set(SAVE_STEPS) <= places


def test_twenty_drills_end_with_the_same_bits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--drills", "20", "--json", str(tmp_path / "drills.json")],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "drills.json").read_text())
    assert len(results) == 20
    assert all(result["resumed"] and result["bitwise"] and not result["problem"] for result in results)
    assert not any(result["hung"] or result["leftovers"] for result in results)
    assert len({result["kind"] for result in results}) >= 12


def test_a_drill_that_goes_wrong_is_not_passed(tmp_path: Path) -> None:
    drill = Drill(
        "another seed",
        "one",
        is_async=False,
        ends=(EXIT_CRASH,),
        exit_interval=8,
        flags={"--seed": 7},
        max_lost=-1,
        says="words that nobody says",
    )
    result = Drills(tmp_path).run(drill, seed=1)
    assert not result.bitwise
    assert result.resumed
    for problem in (
        f"ended with {EXIT_PREEMPTED}, not ({EXIT_CRASH},)",
        "its words do not hold 'words that nobody says'",
        "other weights than the run that nothing happened to",
        "0 iterations lost, at most -1",
    ):
        assert problem in result.problem
    assert table([result]).splitlines()[-1] == "| all | 1 | 1 | 0 | 0 | 0 | 0 |"
