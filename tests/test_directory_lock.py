"""One run to a save directory, and no lock that a dead run keeps."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let import directory_lock, entry
from megatron_let.directory_lock import LOCK_FILE, DirectoryInUseError, lock_directory, lock_file_of
from megatron_let.entry import RunReport
from megatron_let.errors import ConfigError
from megatron_let.exit_status import write_exit_status
from megatron_let.log import LOGGER

ROOT = Path(__file__).parents[1]
HOLDER = """
import os, sys, time
from megatron_let.directory_lock import lock_directory
lock = lock_directory(sys.argv[1])
child = os.fork() if sys.argv[2] == "with a child" else 1
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Return another program that holds the directory."""
    program = _hold(tmp_path, "alone")
    yield program
    program.kill()
    program.communicate()


def _hold(directory: Path, how: str) -> subprocess.Popen:
    program = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), how], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert program.stdout is not None
    program.child_pid = int(program.stdout.readline())  # type: ignore[attr-defined]
    return program


def test_a_second_run_is_refused_in_one_line_that_names_the_first(
    holder: subprocess.Popen, tmp_path: Path
) -> None:
    with pytest.raises(DirectoryInUseError) as refusal:
        lock_directory(tmp_path)
    message = str(refusal.value)
    host = os.uname().nodename
    assert message.startswith(f"--save {tmp_path} is in use by pid {holder.pid} on {host} since 2")
    assert message.endswith("wait for the end of that run, or give another directory")
    assert "\n" not in message
    assert refusal.value.exit_code == 2


def test_the_end_of_a_killed_run_is_waited_for(holder: subprocess.Popen, tmp_path: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.6; kill -9 {holder.pid}"])
    try:
        lock = lock_directory(tmp_path, wait=30.0)
    finally:
        LOGGER.removeHandler(handler)
        killer.wait()
    assert lock is not None
    assert len(lines) == 1
    assert f"is held by pid {holder.pid} on " in lines[0]
    assert "waiting up to 30 s" in lines[0]
    assert (tmp_path / LOCK_FILE).read_text().startswith(f"pid {os.getpid()} on ")


def test_a_child_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path: Path) -> None:
    program = _hold(tmp_path, "with a child")
    program.kill()
    program.wait()
    child: int = program.child_pid  # type: ignore[attr-defined]
    try:
        os.kill(child, 0)  # it is there
        lock = lock_directory(tmp_path)
        assert lock is not None
    finally:
        os.kill(child, signal.SIGKILL)
        program.communicate()


def test_a_lock_is_let_go_at_the_end(tmp_path: Path) -> None:
    lock = lock_directory(tmp_path)
    assert lock is not None
    tries = "import sys; from megatron_let.directory_lock import lock_directory; lock_directory(sys.argv[1])"
    command = [sys.executable, "-c", tries, str(tmp_path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert b"DirectoryInUseError" in refused.stderr
    lock.release()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_where_there_is_nothing_to_lock(tmp_path: Path) -> None:
    assert lock_directory(tmp_path / "nowhere") is None
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("")
    assert lock_directory(tmp_path / "file") is None


def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(directory_lock.LOGGER, "warning", lines.append)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert lock_directory(tmp_path) is not None
    assert lines == [
        f"{tmp_path} is on a file system without locks (No locks available): nothing keeps a second run out of it"
    ]


def test_a_lock_file_that_may_not_be_opened_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(
        ConfigError, match=r"run.lock cannot be opened \(Is a directory\); remove it when no run"
    ):
        lock_directory(tmp_path)


def test_the_directory_of_somebody_else_is_left_to_the_check_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).write_text("")

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        ConfigError, match=r"cannot be opened \(Permission denied: it belongs to .*, mode 644\)"
    ):
        lock_directory(tmp_path)  # a directory for all, in which the file is another's
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert lock_directory(tmp_path) is None


def test_a_directory_put_in_the_place_of_another_has_another_lock_file(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    assert lock_file_of(root) is None
    lock = lock_directory(root)
    held = lock_file_of(root)
    assert held == lock_file_of(root) is not None
    (root / LOCK_FILE).unlink()
    assert lock_file_of(root) is None
    assert lock_directory(root) is not None
    assert lock_file_of(root) not in (None, held)  # while it is held, its number is given to no other file
    assert lock is not None
    lock.release()


def test_a_run_whose_directory_was_taken_leaves_no_status_in_it(tmp_path: Path) -> None:
    def program(report: RunReport) -> int:
        report.saves_to(tmp_path)
        (tmp_path / LOCK_FILE).unlink()
        (tmp_path / LOCK_FILE).write_text("another run")
        raise ConfigError("its directory is lost")

    assert entry.run_main(program) == 2
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_where_the_lock_file_is_on_a_read_only_disk_there_is_nothing_to_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LOCK_FILE).write_text("")

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    assert lock_directory(tmp_path) is None


def test_a_refused_run_leaves_the_others_directory_alone(
    holder: subprocess.Popen,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(entry, "LOCK_WAIT_SECONDS", 0.5)
    write_exit_status(tmp_path, 0, "done", "", 10)
    before = (tmp_path / "exit_status.json").read_bytes()

    def program(report: RunReport) -> int:
        report.saves_to(tmp_path)
        assert report.save_directory is None
        report.is_held(report.hold())
        raise AssertionError("not reached")

    began = time.monotonic()
    assert entry.run_main(program) == 2
    assert time.monotonic() - began >= 0.5
    assert capsys.readouterr().err.startswith(f"error: --save {tmp_path} is in use by pid {holder.pid}")
    assert (tmp_path / "exit_status.json").read_bytes() == before


def test_a_run_holds_its_directory_from_its_first_moment(tmp_path: Path) -> None:
    report = RunReport()
    report.saves_to(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()
    assert report.hold() == str(tmp_path)
    late = RunReport()
    late.saves_to(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    assert late.hold() == str(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run" / LOCK_FILE).exists()
    without = RunReport()
    without.saves_to(None)
    assert without.hold() is None
