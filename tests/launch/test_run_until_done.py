"""scripts/run_until_done.sh: what is started again, what is not, when it gives up, and where its signals go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_let.testing.training import TINY_STUDENT, arguments, training_rows
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "run_until_done.sh"


# A run in small: notes each start, then does what the start's own line of the plan says.
STUB = """#!/usr/bin/env bash
echo start >>"$PLAN.starts"
eval "$(sed -n "$(wc -l <"$PLAN.starts")p" "$PLAN")"
"""

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the script on a plan, one line of shell a start; it is ended after the test."""
    stub, plan, save = tmp_path / "a stub", tmp_path / "plan", tmp_path / "a run"
    stub.write_text(STUB)
    stub.chmod(0o755)
    save.mkdir()
    started: list[subprocess.Popen] = []

    def begin(*lines: str, options: tuple[str, ...] = (), ignored: str = "") -> subprocess.Popen:
        plan.write_text("".join(f"cd '{save}'; {line}\n" for line in lines))
        command = ["bash", str(SCRIPT), "--pause", "0", *options, str(stub), "--save", str(save)]
        if ignored:
            command = ["bash", "-c", f"trap '' {ignored}; exec \"$@\"", "shell", *command]
        environment = {**os.environ, "PLAN": str(plan)}
        program = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(program)
        return program

    yield begin
    for program in started:
        with suppress(ProcessLookupError):  # what it started may still be there when it has ended
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate(timeout=HANG_SECONDS)


def num_starts(tmp_path: Path) -> int:
    """Return how often the stub was started."""
    notes = tmp_path / "plan.starts"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def ended(program: subprocess.Popen) -> tuple[int, str]:
    """Return the script's exit code and the last line that it said."""
    _, err = program.communicate(timeout=HANG_SECONDS)
    lines = err.splitlines()
    assert program.returncode in range(256), err
    return program.returncode, lines[-1] if lines else ""


def reached(iteration: int) -> str:
    """Return the shell line of a run that saves this iteration."""
    return f"mkdir -p iter_{iteration:07d}; echo {iteration} >latest_checkpointed_iteration.txt"


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (4, 1), (130, 1), (127, 1)])
def test_what_is_not_started_again(code: int, starts: int, start: Start, tmp_path: Path) -> None:
    program = start(f"exit {code}", "exit 77")
    assert ended(program)[0] == code
    assert num_starts(tmp_path) == starts


@pytest.mark.parametrize("failure", ["exit 1", "exit 3", "exit 137", "kill -9 $$", "kill -15 $$"])
def test_a_crash_and_a_preemption_are_followed_by_another_start(
    failure: str, start: Start, tmp_path: Path
) -> None:
    assert ended(start(failure, "exit 0"))[0] == 0
    assert num_starts(tmp_path) == 2


def test_it_gives_up_after_so_many_restarts_without_a_newer_checkpoint(start: Start, tmp_path: Path) -> None:
    code, line = ended(start(*["exit 1"] * 9))
    assert code == 1
    assert line == (
        "run_until_done: exit code 1, and no checkpoint newer than iteration 0 after 3 restarts: giving up"
    )
    assert num_starts(tmp_path) == 4


@pytest.mark.parametrize(
    ("third", "starts"), [(8, 4), (9, 6), (6, 6)], ids=["the same", "a newer one", "after a rollback"]
)
def test_only_a_checkpoint_that_none_has_ended_with_before_is_progress(
    third: int, starts: int, start: Start, tmp_path: Path
) -> None:
    crash = "exit 1"
    assert ended(start(f"{reached(8)}; {crash}", crash, f"{reached(third)}; {crash}", *[crash] * 9))[0] == 1
    assert num_starts(tmp_path) == starts


def test_two_checkpoints_in_turn_are_no_progress_for_ever(start: Start, tmp_path: Path) -> None:
    turns = [f"{reached(8)}; exit 1", f"{reached(4)}; exit 1"] * 6
    assert ended(start(*turns))[0] == 1
    assert num_starts(tmp_path) == 5


@pytest.mark.parametrize("text", ["", "abc", "-5", "\\x00\\xff", "999999", "9" * 26, "08x", "release"])
def test_a_tracker_that_names_no_checkpoint_is_no_progress(text: str, start: Start, tmp_path: Path) -> None:
    spoil = f"printf '{text}' >latest_checkpointed_iteration.txt"
    program = start(*[f"{spoil}; exit 1"] * 9, options=("--max-restarts", "1"))
    assert ended(program) == (
        1,
        "run_until_done: exit code 1, and no checkpoint newer than iteration 0 after 1 restarts: giving up",
    )
    assert num_starts(tmp_path) == 2


def test_a_tracker_that_was_wrong_at_first_hides_no_progress(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a run" / "latest_checkpointed_iteration.txt").write_text("999999")
    steps = [f"{reached(iteration)}; exit 1" for iteration in (2, 4, 6, 8)]
    assert ended(start(*steps, "exit 0", options=("--max-restarts", "1")))[0] == 0


@pytest.mark.parametrize("left", ["9" * 20, "300", "-1", '"3"'])
def test_an_exit_status_that_holds_no_exit_code_does_not_count(
    left: str, start: Start, tmp_path: Path
) -> None:
    status = f"""echo '{{"exit_code": {left}, "reason": "x"}}' >exit_status.json"""
    assert ended(start(f"{status}; exit 1", "exit 0"))[0] == 0
    assert num_starts(tmp_path) == 2


def test_a_pipe_in_place_of_a_file_is_not_waited_for(start: Start, tmp_path: Path) -> None:
    pipes = "mkfifo latest_checkpointed_iteration.txt exit_status.json; exit 1"
    assert ended(start(pipes, "exit 0"))[0] == 0


@pytest.mark.parametrize("code", [1, 137, 143], ids=["torchrun", "srun killed ranks", "srun stopped ranks"])
def test_where_the_command_hides_the_code_it_is_read_from_the_status_of_this_start(
    code: int, start: Start, tmp_path: Path
) -> None:
    def leave(own: int) -> str:
        return f"""echo '{{"exit_code": {own}, "reason": "x"}}' >exit_status.json; exit {code}"""

    (tmp_path / "a run" / "exit_status.json").write_text('{"exit_code": 2}')
    program = start(f"exit {code}", leave(3), leave(4), "exit 77")
    assert ended(program)[0] == 4
    assert num_starts(tmp_path) == 3


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_goes_to_the_run_which_is_waited_for_and_not_started_again(
    name: str, start: Start, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    waits = (
        f"trap 'sleep 0.5; {reached(5)}; exit 3' {name[3:]}; touch '{ready}'; while :; do sleep 0.05; done"
    )
    program = start(waits, "exit 77")
    wait_for(ready.exists)
    for _ in range(2):  # as a scheduler does that signals more than once
        program.send_signal(getattr(signal, name))
        time.sleep(0.1)
    code, line = ended(program)
    assert (code, line) == (3, f"run_until_done: exit code 3 after {name}: not started again")
    assert (tmp_path / "a run" / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    assert num_starts(tmp_path) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_that_came_ignored_is_heard_and_under_nohup_a_hangup_is_nothing(
    name: str, start: Start, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    waits = f"trap 'exit 3' {name[3:]}; touch '{ready}'; while :; do sleep 0.05; done"
    program = start(waits, "exit 77", ignored="HUP TERM USR1")
    wait_for(ready.exists)
    os.killpg(program.pid, signal.SIGHUP)  # the script and its run, as when a terminal closes
    program.send_signal(getattr(signal, name))
    assert ended(program) == (3, f"run_until_done: exit code 3 after {name}: not started again")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_srun_gets_the_one_signal_that_it_hands_to_its_tasks(name: str, tmp_path: Path) -> None:
    ready, srun = tmp_path / "ready", tmp_path / "srun"
    srun.write_text(
        f"#!/usr/bin/env bash\ntrap 'kill -9 $$' TERM HUP\ntrap 'exit 3' USR1\ntouch '{ready}'\n"
        "for ((i = 0; i < 1200; i++)); do sleep 0.05; done\n"
    )
    srun.chmod(0o755)
    program = subprocess.Popen(
        ["bash", str(SCRIPT), str(srun), "--save", str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    wait_for(ready.exists)
    program.send_signal(getattr(signal, name))
    assert ended(program) == (3, f"run_until_done: exit code 3 after {name}: not started again")


def test_a_signal_is_followed_by_a_start_when_that_is_asked_for(start: Start, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    waits = f"trap 'exit 3' TERM; touch '{ready}'; while :; do sleep 0.05; done"
    program = start(waits, "exit 0", options=("--restart-after-signal",))
    wait_for(ready.exists)
    program.terminate()
    assert ended(program)[0] == 0
    assert num_starts(tmp_path) == 2


def test_a_signal_during_the_pause_ends_it(start: Start, tmp_path: Path) -> None:
    program = start("exit 1", "exit 77", options=("--pause", "50"))
    wait_for(lambda: num_starts(tmp_path) == 1)
    time.sleep(0.5)
    program.terminate()
    assert ended(program) == (1, "run_until_done: SIGTERM between two starts: not started again")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-restarts", "x", "true", "--save", "d"], "--max-restarts x is not a number"),
        (["--max-restarts", "9" * 20, "true", "--save", "d"], f"--max-restarts {'9' * 20} is not a number"),
        (["--pause"], "--pause needs a value"),
        (["--fast", "true"], "unknown option --fast"),
        ([], "no command given"),
        (["true"], "the command has no --save"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(words: list[str], message: str) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_real_run_that_is_preempted_is_brought_to_its_end(tmp_path: Path) -> None:
    changes = {"--mock-data": None, "--exit-interval": 3, "--save": tmp_path, "--load": tmp_path}
    command = [sys.executable, "pretrain_let.py", *arguments(TINY_STUDENT, changes)]
    done = subprocess.run(
        ["bash", str(SCRIPT), "--pause", "0", *command],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("starting again") == 1
    assert [row["iteration"] for row in training_rows(tmp_path)] == [1, 2, 3, 4, 5]


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until something is so, or fail."""
    deadline = time.monotonic() + HANG_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
