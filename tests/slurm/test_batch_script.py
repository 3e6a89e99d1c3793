"""The sbatch file's decisions, with stand-ins for srun and scontrol: what goes back into the queue, and without which nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm" / "pretrain_let.sbatch"


# The node check prints what UNFIT says, a run does what RUN says. As the real one it kills its tasks at SIGTERM.
SRUN = """#!/usr/bin/env bash
trap 'kill -9 $$' TERM HUP
echo "$*" >>"$NOTES/srun"
case "$*" in
    *check_node.sh*) printf '%s' "$UNFIT" && eval "$CHECK" ;;
    *) eval "$RUN" ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
    *"show job"*) echo "JobId=7 Requeue=1 ExcNodeList=$EXCLUDED Features=(null)" ;;
    *) echo "$*" >>"$NOTES/scontrol" ;;
esac
"""
WAIT = 'touch "$NOTES/ready"; for ((i = 0; i < 600; i++)); do sleep 0.1; done'

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the batch script as Slurm would; it is ended after the test."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    started: list[subprocess.Popen] = []

    def begin(*words: str, script: Path = SCRIPT, directory: Path = ROOT, **changes: str) -> subprocess.Popen:
        variables = {
            "PATH": f"{stand_ins}:{os.environ['PATH']}",
            "NOTES": str(tmp_path),
            "SAVE": str(tmp_path / "a run"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            **{"UNFIT": "", "CHECK": "", "RUN": "", "EXCLUDED": "(null)"},
            **changes,
        }
        program = subprocess.Popen(
            ["bash", str(script), *(words or ("scripts/pretrain_let_tiny.sh", "--seed", "7"))],
            cwd=directory,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(program)
        return program

    yield begin
    for program in started:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


def ended(program: subprocess.Popen) -> tuple[int, str]:
    """Return the script's exit code and what it said."""
    _, err = program.communicate(timeout=HANG_SECONDS)
    return program.returncode, err


def signalled(program: subprocess.Popen, tmp_path: Path, number: int) -> tuple[int, str]:
    """Send the script a signal once its run is at work, and return how it ended."""
    deadline = time.monotonic() + HANG_SECONDS
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    program.send_signal(number)
    return ended(program)


def asked(tmp_path: Path) -> list[str]:
    """Return what scontrol was asked to do."""
    notes = tmp_path / "scontrol"
    return notes.read_text().splitlines() if notes.exists() else []


def test_the_recipe_runs_on_every_task_and_its_arguments_with_it(start: Start, tmp_path: Path) -> None:
    code, err = ended(start())
    assert (code, asked(tmp_path)) == (0, [])
    check, run = (tmp_path / "srun").read_text().splitlines()
    assert check.startswith("--ntasks=2 --ntasks-per-node=1 ")
    assert run == "--kill-on-bad-exit=1 bash scripts/pretrain_let_tiny.sh --seed 7"
    assert "job 7, start 1, on node[1-2]" in err


@pytest.mark.parametrize("code", [3, 138])
def test_near_its_limit_the_job_goes_back_into_the_queue(code: int, start: Start, tmp_path: Path) -> None:
    tracker = 'mkdir "$SAVE/iter_0000012"; echo 12 >"$SAVE/latest_checkpointed_iteration.txt"'
    program = start(RUN=f"trap '{tracker}; exit {code}' USR1; {WAIT}")
    ended_with, err = signalled(program, tmp_path, signal.SIGUSR1)
    assert (ended_with, asked(tmp_path)) == (0, ["requeue 7"])
    assert "newest checkpoint: iteration 12; back into the queue\n" in err


@pytest.mark.parametrize("code", [0, 2, 4])
def test_what_would_end_again_the_same_does_not_go_back(code: int, start: Start, tmp_path: Path) -> None:
    program = start(RUN=f"trap 'exit {code}' USR1; {WAIT}")
    assert signalled(program, tmp_path, signal.SIGUSR1)[0] == code
    assert asked(tmp_path) == []


def test_sigterm_saves_and_ends_for_good(start: Start, tmp_path: Path) -> None:
    code, err = signalled(start(RUN=f"trap 'exit 3' USR1; {WAIT}"), tmp_path, signal.SIGTERM)
    assert (code, asked(tmp_path)) == (3, [])
    assert err.endswith("pretrain_let.sbatch: ends with code 3\n")


@pytest.mark.parametrize(("number", "code", "requeues"), [(signal.SIGUSR1, 0, 1), (signal.SIGTERM, 143, 0)])
def test_a_signal_before_the_start_starts_nothing(
    number: int, code: int, requeues: int, start: Start, tmp_path: Path
) -> None:
    program = start(CHECK='touch "$NOTES/ready"; sleep 1', RUN='touch "$NOTES/began"')
    assert signalled(program, tmp_path, number)[0] == code
    assert len(asked(tmp_path)) == requeues
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize(
    ("before", "after"), [("(null)", "node2"), ("node8,node[4-5]", "node8,node[4-5],node2")]
)
def test_an_unfit_node_is_named_and_left_out(before: str, after: str, start: Start, tmp_path: Path) -> None:
    line = "node2: GPU 3 has 4 uncorrected memory errors\n"
    code, err = ended(start(UNFIT=line, CHECK="exit 1", EXCLUDED=before, RUN='touch "$NOTES/began"'))
    assert code == 0
    assert asked(tmp_path) == ["requeue 7", f"update JobId=7 ExcNodeList={after}"]
    assert f"unfit: {line}" in err
    assert not (tmp_path / "began").exists()


def test_when_all_nodes_are_unfit_none_is_to_blame(start: Start, tmp_path: Path) -> None:
    code, err = ended(start(UNFIT="node1: only 3 MB are free\nnode2: only 3 MB are free\n", CHECK="exit 1"))
    assert (code, asked(tmp_path)) == (2, [])
    assert err.endswith("error: all nodes are unfit: it is not the nodes; what they say stands above\n")


def test_a_check_without_an_answer_goes_back_with_all_nodes(start: Start, tmp_path: Path) -> None:
    assert ended(start(CHECK="exit 1"))[0] == 0
    assert asked(tmp_path) == ["requeue 7"]


@pytest.mark.parametrize(
    ("iterations", "last"),
    [([5, 5, 7, 7, 7, 7], 7), ([12, 8, 12, 8, 12], 12), ([12, 12, 12, 12], 12)],
    ids=["newer", "rolled back", "none"],
)
def test_it_gives_up_after_three_requeues_without_a_checkpoint_that_is_new(
    iterations: list[int], last: int, start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    codes = []
    for iteration in iterations:
        (run / f"iter_{iteration:07d}").mkdir(parents=True, exist_ok=True)
        (run / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
        (tmp_path / "ready").unlink(missing_ok=True)
        program = start(RUN=f"trap 'exit 3' USR1; {WAIT}")
        code, err = signalled(program, tmp_path, signal.SIGUSR1)
        codes.append(code)
    assert codes == [0] * (len(iterations) - 1) + [3]
    assert asked(tmp_path) == ["requeue 7"] * (len(iterations) - 1)
    assert f"no checkpoint newer than iteration {last} after 3 requeues: giving up" in err


def test_the_containers_line_reaches_every_task(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "with_container.sbatch"
    script.write_text(re.sub("^# container=", "container=", SCRIPT.read_text(), flags=re.MULTILINE))
    assert ended(start(script=script))[0] == 0
    option = f"--container-image=/shared/images/pytorch.sqsh --container-mounts={ROOT},/shared --container-workdir={ROOT} bash "
    assert [option in line for line in (tmp_path / "srun").read_text().splitlines()] == [True, True]


MISTAKES = {
    "not under Slurm": ({"SLURM_JOB_ID": ""}, ROOT, (), "this is for Slurm: sbatch "),
    "elsewhere": ({}, ROOT / "tests", (), f"{ROOT / 'tests'} is not the root of the repository"),
    "no such recipe": ({}, ROOT, ("scripts/nowhere.sh",), "scripts/nowhere.sh is not a file; give the path"),
    "no save": ({"SAVE": ""}, ROOT, (), "SAVE is not set: export a directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(mistake: str, start: Start, tmp_path: Path) -> None:
    changes, directory, words, message = MISTAKES[mistake]
    code, err = ended(start(*words, directory=directory, **changes))
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "srun").exists()
