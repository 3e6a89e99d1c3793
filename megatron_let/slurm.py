"""Ranks under bare `srun`: what Slurm says of a task, put into torchrun's words.

    srun --ntasks-per-node=8 python pretrain_let.py ...        # one task is one rank, no launcher

Only a step that srun started makes ranks. A batch script's own shell has SLURM_PROCID and SLURM_NTASKS too, and so has
all that torchrun starts in it: neither counts. Everything else in the package reads torchrun's variables alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from megatron_let.errors import ConfigError

SLURM_TASKS_VARIABLE = "SLURM_STEP_NUM_TASKS"
_RANK = "SLURM_PROCID"
_ON_NODE = ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES")
_COUNTS = (SLURM_TASKS_VARIABLE, _RANK, *_ON_NODE, "SLURM_JOB_ID", "SLURM_STEP_ID")
_LISTS = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
_FIRST_PORT, _PORTS = 20000, 10000  # below the ports that Linux hands out by itself


def adopt_slurm_ranks(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables for a task that srun started with others; leave everything else as it is.

    A launcher's own RANK and WORLD_SIZE win, and so do MASTER_ADDR, MASTER_PORT and OMP_NUM_THREADS where given. Otherwise the ranks meet on
    the first node of the step, at a port that follows from job and step, so that jobs on one node do not meet.

    Raises:
        ConfigError: part of Slurm's variables is missing, or they contradict each other.
    """
    if not is_slurm_rank(environment):
        return
    missing = [name for name in (*_COUNTS, *_LISTS) if name not in environment]
    wrong = [name for name in _COUNTS if not environment.get(name, "0").isdecimal()]
    if missing or wrong:
        what = f"{', '.join(missing or wrong)} {'missing' if missing else 'not a number'}"
        raise ConfigError(
            f"srun's environment came through only in part ({what}); let the tasks keep all SLURM_ variables, "
            "or start them with torchrun"
        )
    tasks, rank, local_rank, node, nodes, job, step = (int(environment[name]) for name in _COUNTS)
    on_node = _tasks_on_node(environment["SLURM_STEP_TASKS_PER_NODE"], node)
    if rank >= tasks or local_rank >= on_node:
        raise ConfigError(
            f"srun's environment contradicts itself: task {rank} of {tasks}, task {local_rank} of {on_node} on node {node}; "
            "keep SLURM_ variables of another step out of it"
        )
    environment.update(
        RANK=str(rank), WORLD_SIZE=str(tasks), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(on_node)
    )
    # A lone node's name need not resolve.
    first = "127.0.0.1" if nodes == 1 else first_host(environment["SLURM_STEP_NODELIST"])
    environment.setdefault("MASTER_ADDR", first)
    environment.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # torchrun's choice: else each rank takes all processors of its node
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (16 * job + step) % _PORTS))


def is_slurm_rank(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this as one of several tasks and no launcher stands between.

    One that is not told how many there are counts too, where what else it is told no batch script's shell has: its
    environment came through only in part.
    """
    if {"RANK", "WORLD_SIZE"} & environment.keys():
        return False
    if SLURM_TASKS_VARIABLE in environment:
        return environment[SLURM_TASKS_VARIABLE] != "1"
    return environment.get(_RANK, "0") != "0" or bool({"SLURM_STEP_NUM_NODES", *_LISTS} & environment.keys())


def first_host(hosts: str) -> str:
    """Return the first of a Slurm host list such as `rack[2-3]node[007-011,020],login`: `rack2node007`.

    Raises:
        ConfigError: it is no host list.
    """
    item = re.match(r"(?:[\w.-]|\[\d+[\d,-]*\])+(?=,|$)", hosts)
    if item is None:
        raise ConfigError(
            f"SLURM_STEP_NODELIST {hosts!r} is no list of hosts; give the host of rank 0 in MASTER_ADDR"
        )
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", item[0])


def _tasks_on_node(counts: str, node: int) -> int:
    """Return the tasks on a node of the step, out of a list such as `8(x3),4`: 8 on nodes 0 to 2, 4 on node 3.

    Raises:
        ConfigError: it is no such list, or does not reach so far.
    """
    last = -1
    for item in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            break
        last += int(match[2] or 1)
        if node <= last:
            return int(match[1])
    raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE {counts!r} does not tell the tasks on node {node}")
