"""How real training on two ranks ends: what fails on one rank, what is killed, and signals at every level."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_let.testing.distributed import _free_port
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.checkpoint_files import find_damage, read_tracker
from tests.launch.test_launcher import ROOT, status_in, wait_for, workers_run
from tests.processes import HANG_SECONDS

PROGRAM = Path(__file__).parent / "training_program.py"
SCRIPT = ROOT / "scripts" / "run_until_done.sh"


Launch = Callable[..., subprocess.Popen]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Return a function that trains with a fault, by default through the launcher; all is killed after the test."""
    started: list[subprocess.Popen] = []

    def start(
        fault: str,
        *before: str,
        launcher: str = "megatron_let.launch",
        words: tuple[str, ...] = ("--nproc-per-node", "2"),
        changes: dict[str, object] | None = None,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        save = tmp_path / "save"
        flags = arguments(
            TINY_STUDENT,
            {"--mock-data": None, "--save": save, "--load": save, "--num-workers": 1, **(changes or {})},
        )
        kept = {name: value for name, value in os.environ.items() if name != "RANK"}
        program = subprocess.Popen(
            [*before, sys.executable, "-m", launcher, *words, str(PROGRAM), fault, str(tmp_path), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, "PYTHONPATH": str(ROOT), **(environment or {})},
            start_new_session=True,
        )
        started.append(program)
        return program

    yield start
    for program in started:
        with suppress(ProcessLookupError):  # what it started may still be there when it has ended
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


CAUSES = {
    "forward": "RuntimeError: the tap dripped",
    "slow_end": "RuntimeError: the tap dripped",
    "save": "RuntimeError: the tap dripped",
    "loader": "RuntimeError: the tap dripped",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_what_fails_on_one_rank_is_said_last_and_ends_all(fault: str, launch: Launch, tmp_path: Path) -> None:
    # Forked data-loader workers would keep the failing rank's connections open.
    changes = {"--num-workers": 0} if fault == "slow_end" else {}
    program = launch(fault, changes={"--save-interval": 2, **changes})
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 1
    last = err[err.rindex("rank 1:\nTraceback") :]
    assert CAUSES[fault] in last
    assert "rank 0:\n" not in err
    status = status_in(tmp_path / "save")
    assert (status["exit_code"], status["reason"]) == (1, "crash")
    assert not workers_run(tmp_path)
    assert read_tracker(tmp_path / "save") == (None if fault == "loader" else 2)


def test_a_killed_data_loader_worker_is_named_with_its_signal(launch: Launch, tmp_path: Path) -> None:
    program = launch("kill_loader", changes={"--save-interval": 2})
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 1, err
    last = err.splitlines()[-1]
    assert re.match(r"error: data-loader worker 0 \(pid \d+\) of rank 1 was ended by SIGKILL \(often: ", last)
    assert "Traceback" not in err
    assert status_in(tmp_path / "save")["message"] == last
    assert not workers_run(tmp_path)


def test_sigterm_to_everything_at_once_and_twice_saves_and_is_not_started_again(
    launch: Launch, tmp_path: Path
) -> None:
    changes: dict[str, object] = {"--exit-signal-handler": None, "--train-iters": 1000}
    program = launch("slow", "bash", str(SCRIPT), changes=changes)
    wait_for(lambda: len(list(tmp_path.glob("pid_*"))) == 4)
    for _ in range(2):
        os.killpg(program.pid, signal.SIGTERM)  # the script and the launcher, which passes it on
        for note in tmp_path.glob("pid_*"):  # ranks and loaders, as a scheduler does
            os.kill(int(note.read_text()), signal.SIGTERM)
        time.sleep(0.4)
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 3, err
    assert err.endswith("run_until_done: exit code 3 after SIGTERM: not started again\n")
    saved = read_tracker(tmp_path / "save")
    status = status_in(tmp_path / "save")
    assert saved is not None
    assert (status["reason"], status["iteration"]) == ("preempted", saved)
    assert find_damage(tmp_path / "save" / f"iter_{saved:07d}") is None
    assert not workers_run(tmp_path)


def test_a_second_signal_in_a_save_ends_at_once_and_leaves_the_checkpoint_before(
    launch: Launch, tmp_path: Path
) -> None:
    changes: dict[str, object] = {"--exit-signal-handler": None, "--train-iters": 1000, "--exit-interval": 2}
    program = launch("slow", changes=changes)
    program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 3
    changes.pop("--exit-interval")
    for note in tmp_path.glob("pid_*"):
        note.unlink()
    program = launch("slow", changes=changes, environment={"SAVES_LONG": "1"})
    wait_for(lambda: len(list(tmp_path.glob("pid_*"))) == 4)
    program.terminate()
    wait_for(lambda: all((tmp_path / f"saving_{rank}").exists() for rank in (0, 1)))
    time.sleep(2.2)
    program.terminate()
    _, err = program.communicate(timeout=HANG_SECONDS)  # the save would take hours
    assert program.returncode == 128 + signal.SIGTERM
    assert "error: SIGTERM came again after " in err.splitlines()[-1]
    assert read_tracker(tmp_path / "save") == 2
    assert find_damage(tmp_path / "save" / "iter_0000002") is None
    assert not workers_run(tmp_path)


def test_under_bare_torchrun_the_others_end_when_a_rank_is_killed(launch: Launch, tmp_path: Path) -> None:
    program = launch("kill_rank", launcher="torch.distributed.run")
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 1
    assert "rank      : 1 (local_rank: 1)" in err
    assert "Signal 9 (SIGKILL)" in err
    assert not workers_run(tmp_path)


@pytest.mark.parametrize("script", [True, False], ids=["below the script", "alone"])
def test_sigusr1_to_bare_torchrun_loses_nothing(script: bool, launch: Launch, tmp_path: Path) -> None:
    changes: dict[str, object] = {"--exit-signal-handler": None, "--train-iters": 1000, "--num-workers": 0}
    before = ("bash", str(SCRIPT)) if script else ()
    program = launch("slow", *before, launcher="torch.distributed.run", changes=changes)
    wait_for(lambda: len(list(tmp_path.glob("pid_*"))) == 2)
    program.send_signal(signal.SIGUSR1)
    program.communicate(timeout=HANG_SECONDS)
    # The script has torchrun pass it on. Alone torchrun ends by it, and its ranks hear of that.
    assert program.returncode == (3 if script else -signal.SIGUSR1)
    wait_for(lambda: not workers_run(tmp_path))
    saved, status = read_tracker(tmp_path / "save"), status_in(tmp_path / "save")
    assert saved is not None
    assert (status["exit_code"], status["iteration"]) == (3, saved)
    assert find_damage(tmp_path / "save" / f"iter_{saved:07d}") is None


def test_on_two_nodes_a_killed_rank_ends_both_and_its_own_node_names_it(
    launch: Launch, tmp_path: Path
) -> None:
    port = _free_port()
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two")
    nodes = [
        launch("kill_rank", words=("--nnodes", "2", "--nproc-per-node", "1", *rendezvous)) for _ in range(2)
    ]
    ends = [(node.communicate(timeout=HANG_SECONDS)[1], node.returncode) for node in nodes]
    assert sorted(code for _, code in ends) == [1, 128 + signal.SIGKILL]
    ((killed, _),) = [end for end in ends if end[1] != 1]
    ((other, _),) = [end for end in ends if end[1] == 1]
    assert "error: rank 1 (pid " in killed.splitlines()[-1]
    assert "rank 0:\nTraceback" in other
    assert not workers_run(tmp_path)
