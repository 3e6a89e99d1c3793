"""Slurm's variables in torchrun's words: whose they are, what is missing, and where the ranks meet."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from megatron_let import entry
from megatron_let.entry import RunReport, run_main
from megatron_let.errors import ConfigError
from megatron_let.exit_status import LAUNCH_DIRECTORY_VARIABLE
from megatron_let.slurm import adopt_slurm_ranks, first_host

# What a batch script's own shell sees of a job with 2 x 2 tasks, and what srun adds for task 3.
BATCH_SHELL = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
TASK = {
    **BATCH_SHELL,
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


def adopted(environment: dict[str, str]) -> dict[str, str]:
    """Return what is added to an environment or changed in it."""
    after = dict(environment)
    adopt_slurm_ranks(after)
    return {name: value for name, value in after.items() if environment.get(name) != value}


def test_a_task_of_srun_is_a_rank() -> None:
    assert adopted(TASK) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20000 + (16 * 4711 + 2) % 10000),
        "OMP_NUM_THREADS": "1",
    }


ONE_TASK = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH_SHELL,
        {**BATCH_SHELL, **TORCHRUN},
        {**TASK, **TORCHRUN},
        {**TASK, "RANK": "1"},
        {**TASK, **ONE_TASK},
        {**BATCH_SHELL, "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8"},
        {**TASK, **ONE_TASK, "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8"},
    ],
    ids=[
        "no Slurm",
        "the batch script's shell",
        "torchrun in a batch script",
        "torchrun in a task",
        "half of torchrun in a task",
        "one task",
        "an array's shell",
        "an array's one task",
    ],
)
def test_what_is_no_task_of_several_or_has_a_launcher_stays_as_it_is(environment: dict[str, str]) -> None:
    assert adopted(environment) == {}


def test_where_the_ranks_meet_and_their_threads_can_be_given() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "4"}
    assert adopted({**TASK, **given}).keys() == {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}


def test_on_one_node_its_name_need_not_resolve() -> None:
    one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert adopted({**TASK, **one_node})["MASTER_ADDR"] == "127.0.0.1"


def test_array_members_and_steps_of_a_job_meet_at_ports_of_their_own() -> None:
    ports = {
        adopted({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(4711, 4719)
        for step in range(4)
    }
    assert len(ports) == 32


@pytest.mark.parametrize("task", ["3", "0"])
@pytest.mark.parametrize("missing", [name for name in TASK if TASK[name] != BATCH_SHELL.get(name)])
def test_half_of_sruns_variables_are_refused_by_name(missing: str, task: str) -> None:
    half = {name: value for name, value in {**TASK, "SLURM_PROCID": task}.items() if name != missing}
    with pytest.raises(ConfigError, match=f"only in part \\({missing} missing\\); let the tasks keep all"):
        adopt_slurm_ranks(half)


CONTRADICTIONS = {
    "no number": ({"SLURM_PROCID": "three"}, "SLURM_PROCID not a number"),
    "rank outside": ({"SLURM_PROCID": "4"}, "task 4 of 4, task 1 of 2 on node 1"),
    "local rank outside": ({"SLURM_LOCALID": "2"}, "task 3 of 4, task 2 of 2 on node 1"),
    "node outside": ({"SLURM_NODEID": "2"}, "does not tell the tasks on node 2"),
    "no list of counts": ({"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, "'2(y2)' does not tell"),
    "no list of hosts": ({"SLURM_STEP_NODELIST": "(null)"}, "is no list of hosts; give the host of rank 0"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_is_refused(case: str) -> None:
    changes, message = CONTRADICTIONS[case]
    with pytest.raises(ConfigError) as refused:
        adopt_slurm_ranks({**TASK, **changes})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-4]", "node1"),
        ("node[007-011,020],login", "node007"),
        ("node[5,7-9]", "node5"),
        ("rack[2-3]node[07-09]", "rack2node07"),
        ("a-b.c_d[10]-ib,x", "a-b.c_d10-ib"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_tasks_per_node_are_those_of_the_tasks_own_node() -> None:
    uneven = {"SLURM_STEP_NUM_TASKS": "23", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4,3"}
    for node, tasks in enumerate((8, 8, 4, 3)):
        assert adopted({**TASK, **uneven, "SLURM_NODEID": str(node)})["LOCAL_WORLD_SIZE"] == str(tasks)


def test_a_program_has_its_rank_before_it_begins_and_speaks_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    actions: list[Any] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", LAUNCH_DIRECTORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(entry.os, "environ", dict(TASK))
    monkeypatch.setattr(entry.time, "sleep", waits.append)
    monkeypatch.setattr(entry.signal, "signal", lambda number, action: actions.append((number, action)))
    monkeypatch.setattr(entry.os, "_exit", actions.append)

    def program(report: RunReport) -> int:
        raise ConfigError(f"rank {entry.os.environ['RANK']} says no")

    assert run_main(program) == 2
    assert waits == [1.25]
    assert capsys.readouterr().err == "error: rank 3 says no\n"
    ((number, action),) = actions
    assert number == signal.SIGTERM
    action(number, None)
    assert actions[-1] == 2, "srun tells of the largest code: a stopped rank's is its own, not the signal's"
