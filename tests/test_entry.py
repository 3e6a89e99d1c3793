"""What surrounds a program's main: codes, last words, and the record of the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let import entry
from megatron_let.entry import RunReport, run_main
from megatron_let.errors import ConfigError
from megatron_let.exit_status import LAUNCH_DIRECTORY_VARIABLE, read_records, write_exit_status


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test be a program that no launcher started."""
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", LAUNCH_DIRECTORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_a_users_mistake_is_one_line_code_2_and_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(report: RunReport) -> int:
        report.saves_to(tmp_path)
        print("out")
        raise ConfigError("k = 9 is given,\n1 to 8 is allowed")

    assert run_main(program) == 2
    assert capsys.readouterr() == ("out\n", "error: k = 9 is given, 1 to 8 is allowed\n")
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert (status["exit_code"], status["message"]) == (2, "error: k = 9 is given, 1 to 8 is allowed")


def test_an_unexpected_exception_keeps_its_traceback_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def program(report: RunReport) -> int:
        raise RuntimeError("boom")

    assert run_main(program) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("RuntimeError: boom\n")


def test_ctrl_c_is_130_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def program(report: RunReport) -> int:
        raise KeyboardInterrupt

    assert run_main(program) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_programs_own_code_and_reason_are_recorded(tmp_path: Path) -> None:
    def program(report: RunReport) -> int:
        report.saves_to(tmp_path)
        report.iteration, report.reason, report.message = 70, "exit interval", "saved at iteration 70"
        return 0

    assert run_main(program) == 0
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert (status["exit_code"], status["reason"], status["iteration"]) == (0, "exit interval", 70)


def test_a_crash_does_not_write_over_the_status_of_a_peers_mistake(tmp_path: Path) -> None:
    def program(report: RunReport) -> int:
        report.saves_to(tmp_path)
        write_exit_status(tmp_path, 2, "bad configuration", "error: a peer's", None)
        raise RuntimeError("connection closed by peer")

    run_main(program)
    assert json.loads((tmp_path / "exit_status.json").read_text())["message"] == "error: a peer's"


def test_under_the_launcher_a_rank_leaves_a_record_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCH_DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")

    def program(report: RunReport) -> int:
        raise ConfigError("no")

    assert run_main(program) == 2
    assert capsys.readouterr() == ("", "")
    assert read_records(tmp_path)[3].message == "error: no"


def test_a_rank_speaks_itself_when_its_record_cannot_be_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCH_DIRECTORY_VARIABLE, str(tmp_path / "gone"))

    def program(report: RunReport) -> int:
        raise ConfigError("no")

    assert run_main(program) == 2
    assert capsys.readouterr().err == "error: no\n"


def test_under_torchrun_rank_0_speaks_at_once_and_the_others_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(entry.time, "sleep", waits.append)
    monkeypatch.setattr(entry, "die_with_launcher", lambda: None)
    monkeypatch.setattr(entry.signal, "signal", lambda number, action: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    def program(report: RunReport) -> int:
        raise ConfigError("no")

    for rank in ("0", "1", "3"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        run_main(program)
    assert waits == [1.25, 1.75]
    assert capsys.readouterr().err == "error: no\n" * 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
@pytest.mark.parametrize("code", [0, 3])
def test_a_program_whose_output_cannot_be_written_keeps_its_code(code: int) -> None:
    program = (
        "from megatron_let.entry import end_program, run_main\n"
        "from megatron_let.log import LOGGER, configure_logging\n"
        "configure_logging()\n"
        f"end_program(run_main(lambda report: LOGGER.info('a line') or {code}))\n"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=full, check=False)
    assert ended.returncode == code
