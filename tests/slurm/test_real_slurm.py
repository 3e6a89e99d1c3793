"""A real Slurm of one node: the sbatch file across a time limit, an unfit node, and what srun tells its tasks."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.testing.training import assert_bitwise, numbers, train
from megatron_let.training.checkpoint_files import read_tracker
from tests.processes import HANG_SECONDS
from tests.slurm.cluster import ROOT, Cluster, missing, wait_for

WHY_NOT = missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

BATCH_SCRIPT = "scripts/slurm/pretrain_let.sbatch"
RECIPE = "scripts/pretrain_let_tiny.sh"
ON_THIS_MACHINE = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a Slurm that runs."""
    slurm = Cluster(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.stop()


def test_a_run_cut_by_its_time_limit_ends_as_an_uncut_one(
    cluster: Cluster, pool: RankPool, tmp_path: Path
) -> None:
    cut, uncut, teacher, log = (tmp_path / name for name in ("a cut run", "uncut", "teacher", "job.log"))
    write_tiny_teacher("llama", teacher)
    job = cluster.submit(
        *ON_THIS_MACHINE,
        *("--time=10", "--signal=B:USR1@120", f"--output={log}", BATCH_SCRIPT, RECIPE),
        SAVE=str(cut),
        TEACHER=str(teacher),
        NOTES=str(tmp_path),
        ENTRY=str(Path(__file__).with_name("waiting_program.py")),
    )
    wait_for(lambda: all((tmp_path / f"waits_{rank}").exists() for rank in (0, 1)), HANG_SECONDS)
    hours, minutes, _ = (int(part) for part in cluster.job(job)["RunTime"].split(":"))
    # Slurm looks at its limits twice a minute: this one is near when it looks next, and a minute or more away.
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", HANG_SECONDS)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    wait_for(lambda: cluster.is_over(job), HANG_SECONDS)
    printed = log.read_text()
    end = cluster.job(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), printed
    assert [(tmp_path / f"heard_{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2
    assert " exiting at iteration 4: received SIGUSR1\n" in printed
    assert f"loaded {cut}/iter_0000004 at iteration 4\n" in printed
    assert json.loads((cut / "exit_status.json").read_text())["reason"] == "done"
    assert read_tracker(cut) == 20
    pool.run(2, train, flags_of_recipe(SAVE=str(uncut), TEACHER=str(teacher)))
    assert numbers(cut) == numbers(uncut)
    assert_bitwise(cut, uncut, 20)


def test_a_run_that_is_told_to_end_saves_and_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    save, log = tmp_path / "run", tmp_path / "job.log"
    job = cluster.submit(
        *ON_THIS_MACHINE,
        *("--time=10", f"--output={log}", BATCH_SCRIPT, RECIPE),
        SAVE=str(save),
        NOTES=str(tmp_path),
        ENTRY=str(Path(__file__).with_name("waiting_program.py")),
    )
    wait_for(lambda: all((tmp_path / f"waits_{rank}").exists() for rank in (0, 1)), HANG_SECONDS)
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: cluster.is_over(job), HANG_SECONDS)
    printed = log.read_text()
    end = cluster.job(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "0"), printed
    assert [(tmp_path / f"heard_{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2
    assert read_tracker(save) == 4
    assert json.loads((save / "exit_status.json").read_text())["reason"] == "preempted"


def flags_of_recipe(**variables: str) -> list[str]:
    """Return the flags with which the recipe starts the training program."""
    environment = {"PATH": os.environ["PATH"], "LAUNCHER": "srun", "DRY_RUN": "1", **variables}
    done = subprocess.run(
        ["bash", str(ROOT / RECIPE)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    return shlex.split(done.stdout)[2:]


def test_an_unfit_node_is_left_out_when_the_job_goes_back(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    settings = {"SAVE": str(tmp_path / "save"), "MIN_FREE_MB": str(1 << 40)}
    job = cluster.submit(*ON_THIS_MACHINE, "--time=1", f"--output={log}", BATCH_SCRIPT, RECIPE, **settings)
    wait_for(lambda: cluster.job(job)["ExcNodeList"] == "node1", HANG_SECONDS)
    wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", HANG_SECONDS)
    cluster.run("scancel", job)
    printed = log.read_text()
    assert "pretrain_let.sbatch: unfit: node1: only " in printed
    assert "back into the queue, without node1\n" in printed


TELL = (
    "import json, os; from megatron_let.slurm import adopt_slurm_ranks; before = set(os.environ); "
    "adopt_slurm_ranks(os.environ); print(json.dumps({n: os.environ[n] for n in set(os.environ) - before}))"
)


def test_ranks_are_the_tasks_of_a_step_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    tell = f'"$PYTHON" -c {shlex.quote(TELL)}'
    script.write_text(
        f"#!/bin/bash\n{tell}\nsrun --ntasks=1 {tell}\nsrun --ntasks=3 {tell}\n"
        f"srun --ntasks=2 env RANK=0 WORLD_SIZE=1 {tell}\n"
    )
    words = ("--ntasks=3", "--array=0-1", "--time=1", f"--output={tmp_path}/%a.log", str(script))
    job = cluster.submit(*words)
    wait_for(lambda: cluster.is_over(job), HANG_SECONDS)
    ports = []
    for member in ("0", "1"):
        printed = (tmp_path / f"{member}.log").read_text().splitlines()
        lines = [json.loads(line) for line in printed if line.startswith("{")]  # srun may say that it waits
        assert len(lines) == 7
        assert lines[:2] == lines[5:] == [{}, {}]
        assert sorted(line["RANK"] for line in lines[2:5]) == ["0", "1", "2"]
        (shared,) = {
            (line["WORLD_SIZE"], line["LOCAL_WORLD_SIZE"], line["MASTER_ADDR"]) for line in lines[2:5]
        }
        assert shared == ("3", "3", "127.0.0.1")
        assert all(line["LOCAL_RANK"] == line["RANK"] for line in lines[2:5])
        ports.append({line["MASTER_PORT"] for line in lines[2:5]})
    assert len(ports[0]) == len(ports[1]) == 1
    assert ports[0] != ports[1], "members of an array may share a node"


REFUSED = """
from megatron_let.entry import end_program, run_main
from megatron_let.errors import ConfigError
def main(report):
    raise ConfigError("k = 9 is given, 1 to 8 is allowed")
end_program(run_main(main))
"""


def test_a_mistake_under_srun_is_said_once_and_its_code_is_the_steps(
    cluster: Cluster, tmp_path: Path
) -> None:
    script, log = tmp_path / "job.sh", tmp_path / "job.log"
    script.write_text(
        f'#!/bin/bash\nsrun --kill-on-bad-exit=1 "$PYTHON" -c {shlex.quote(REFUSED)}\necho "code $?"\n'
    )
    job = cluster.submit("--ntasks=4", "--time=1", f"--output={log}", str(script))
    wait_for(lambda: cluster.is_over(job), HANG_SECONDS)
    lines = log.read_text().splitlines()
    assert [line for line in lines if "k = 9" in line] == ["error: k = 9 is given, 1 to 8 is allowed"]
    assert lines[-1] == "code 2"
