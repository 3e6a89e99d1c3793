"""The launcher, with real workers: whose code it ends with, what it says last, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_let.launch.launcher import main
from tests.processes import HANG_SECONDS, is_running

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "program.py"


Launch = Callable[..., subprocess.Popen]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Return a function that starts the program on two ranks; what still runs after the test is killed."""
    started: list[subprocess.Popen] = []

    def start(
        ending: str, *arguments: str, launcher: str = "megatron_let.launch", before: tuple[str, ...] = ()
    ) -> subprocess.Popen:
        command = [*before, sys.executable, "-m", launcher, "--nproc-per-node", "2", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        environment["PYTHONPATH"] = str(ROOT)
        program = subprocess.Popen(
            [*command, str(PROGRAM), ending, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(program)
        return program

    yield start
    for note in tmp_path.glob("pid_*"):  # a failed test's, which would keep the streams open
        if is_running(int(note.read_text())):
            os.kill(int(note.read_text()), signal.SIGKILL)
    for program in started:
        program.kill()
        program.communicate()


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until something is so, or fail."""
    deadline = time.monotonic() + HANG_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def status_in(directory: Path) -> dict[str, Any]:
    """Read the exit status that a run left."""
    status: dict[str, Any] = json.loads((directory / "exit_status.json").read_text())
    return status


def workers_run(directory: Path) -> bool:
    """Return whether a worker, or a child of one, is still there (one stopped at its start has left no id)."""
    return any(is_running(int(note.read_text())) for note in directory.glob("pid_*"))


def test_a_good_run_ends_with_0_and_says_only_what_its_workers_say(launch: Launch, tmp_path: Path) -> None:
    program = launch("well")
    out, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 0, err
    assert out.splitlines() == ["sum 2", "sum 2"]
    assert status_in(tmp_path)["reason"] == "done"


def test_a_configuration_error_of_all_ranks_is_one_line_and_code_2(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "exit_status.json").write_text("of an earlier run")
    program = launch("all_misconfigured")
    out, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: 3 is given, only 1, 2 and 4 are allowed")
    status = status_in(tmp_path)
    assert (status["exit_code"], status["reason"], status["iteration"]) == (2, "bad configuration", 3)
    assert status["message"] == err.strip()


def test_a_crash_of_one_rank_shows_its_traceback_last_and_ends_the_others(
    launch: Launch, tmp_path: Path
) -> None:
    program = launch("rank_1_raises")
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 1
    assert err.startswith("rank 1:\nTraceback")
    assert err.endswith("RuntimeError: the tap dripped\n")
    assert err.count("Traceback") == 1
    assert status_in(tmp_path)["message"] == "error: RuntimeError: the tap dripped"
    assert not workers_run(tmp_path)


def test_a_worker_killed_by_a_signal_gives_128_plus_n(launch: Launch, tmp_path: Path) -> None:
    program = launch("rank_1_killed")
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 128 + signal.SIGKILL
    assert err.count("\n") == 1
    assert err.startswith("error: rank 1 (pid ")
    assert status_in(tmp_path)["reason"] == "signal SIGKILL"


def test_a_code_without_a_word_is_passed_on_and_named(launch: Launch) -> None:
    program = launch("plain_code")
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 7
    assert err == "error: rank 1 ended with exit code 7; its own output says why\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_goes_to_the_workers_which_may_save_and_choose_the_code(
    number: int, launch: Launch, tmp_path: Path
) -> None:
    program = launch("saves_on_sigterm")
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    program.send_signal(number)
    wait_for(lambda: all((tmp_path / f"saving_{rank}").exists() for rank in (0, 1)))
    program.send_signal(number)  # a second one during the save
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 5, err
    assert all(int((tmp_path / f"saved_{rank}").read_text()) >= 2 for rank in (0, 1))
    assert status_in(tmp_path)["exit_code"] == 5


def test_under_nohup_a_hangup_is_nothing_and_sigterm_is_heard_whatever_came_ignored(
    launch: Launch, tmp_path: Path
) -> None:
    program = launch("saves_on_sigterm", before=("bash", "-c", "trap '' HUP TERM USR1; exec \"$@\"", "shell"))
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    os.killpg(program.pid, signal.SIGHUP)  # the launcher alone: each worker has a group of its own
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 5, err


def test_workers_that_ignore_sigterm_are_killed_after_the_grace(launch: Launch, tmp_path: Path) -> None:
    program = launch("ignores_sigterm", "--shutdown-timeout", "1")
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=HANG_SECONDS)  # they would wait for twice as long
    assert program.returncode == 128 + signal.SIGKILL
    assert not workers_run(tmp_path)


def test_ctrl_c_delivered_twice_is_one_and_a_worker_says_it_in_one_line(
    launch: Launch, tmp_path: Path
) -> None:
    program = launch("waits")
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    program.send_signal(signal.SIGINT)
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert (program.returncode, err) == (128 + signal.SIGINT, "error: interrupted\n")


def test_a_second_signal_ends_the_run_at_once_in_one_line(launch: Launch, tmp_path: Path) -> None:
    program = launch("says_second_signal")
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    program.send_signal(signal.SIGTERM)
    wait_for(lambda: all((tmp_path / f"heard_{rank}_1").exists() for rank in (0, 1)))
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 128 + signal.SIGTERM
    assert err.startswith("error: a second one (")
    assert err.count("\n") == 1
    status = status_in(tmp_path)
    assert (status["exit_code"], status["reason"]) == (143, "signal SIGTERM")


def kill_launcher(program: subprocess.Popen, directory: Path) -> None:
    """Kill the launcher alone."""
    program.kill()


def kill_group(program: subprocess.Popen, directory: Path) -> None:
    """Kill the launcher's process group."""
    os.killpg(program.pid, signal.SIGKILL)


def kill_rank_1(program: subprocess.Popen, directory: Path) -> None:
    """Kill a worker."""
    os.kill(int((directory / "pid_1").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("launcher", ["megatron_let.launch", "torch.distributed.run"])
@pytest.mark.parametrize("kill", [kill_launcher, kill_group, kill_rank_1])
def test_nothing_outlives_a_launcher_or_a_worker_that_is_killed(
    kill: Callable[[subprocess.Popen, Path], None], launcher: str, launch: Launch, tmp_path: Path
) -> None:
    program = launch("with_children", launcher=launcher)
    wait_for(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)))
    assert len(list(tmp_path.glob("pid_*"))) == 4
    assert workers_run(tmp_path)
    kill(program, tmp_path)
    if kill is kill_rank_1:
        _, err = program.communicate(timeout=HANG_SECONDS)
        assert program.returncode != 0
        assert "rank 1 (pid " in err or "rank      : 1" in err
    wait_for(lambda: not workers_run(tmp_path))


def test_a_rank_that_is_refused_before_rank_0_has_come_to_the_directory_leaves_its_status_there(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "exit_status.json").write_text('{"exit_code": 0}')
    os.utime(tmp_path / "exit_status.json", (1.0, 1.0))  # an earlier run's
    program = launch("rank_1_misconfigured_first")
    _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 2, err
    status = status_in(tmp_path)
    assert (status["exit_code"], status["reason"]) == (2, "bad configuration")
    assert status["message"] == "error: 3 is given, only 1, 2 and 4 are allowed (1)"


def test_under_bare_torchrun_the_line_is_one_ranks_last_word(launch: Launch) -> None:
    program = launch("rank_1_misconfigured", launcher="torch.distributed.run")
    _, err = program.communicate(timeout=HANG_SECONDS)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert lines == ["error: 3 is given, only 1, 2 and 4 are allowed (1)"]


def test_a_port_that_is_taken_is_one_line_and_code_2(launch: Launch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        program = launch("well", "--master-addr", "127.0.0.1", "--master-port", str(port))
        _, err = program.communicate(timeout=HANG_SECONDS)
    assert program.returncode == 2
    assert re.fullmatch(
        rf"error: a port is in use \(.*port: {port}.*\); give another --master-port .*\n", err
    )


def test_a_script_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nproc-per-node", "2", "nowhere.py", "--tp", "2"]) == 2
    assert capsys.readouterr().err == "error: nowhere.py is not a file; give the path of the script to run\n"
