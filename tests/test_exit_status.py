"""The status file and the records between workers and launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_let import exit_status
from megatron_let.exit_status import (
    FailureRecord,
    clear_exit_status,
    has_exit_status_since,
    leave_record,
    read_records,
    write_exit_status,
)


def test_a_status_is_written_whole_and_replaced(tmp_path: Path) -> None:
    assert write_exit_status(tmp_path, 1, "crash", "error: boom", 7)
    assert write_exit_status(tmp_path, 0, "done", "", 10)
    status = json.loads((tmp_path / "exit_status.json").read_text())
    assert {key: status[key] for key in ("exit_code", "reason", "message", "iteration")} == {
        "exit_code": 0,
        "reason": "done",
        "message": "",
        "iteration": 10,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["exit_status.json"]


def test_a_status_that_cannot_be_written_is_no_error_and_makes_no_directory(tmp_path: Path) -> None:
    assert not write_exit_status(tmp_path / "nowhere", 1, "crash", "", None)
    assert not (tmp_path / "nowhere").exists()
    clear_exit_status(tmp_path / "nowhere")


def test_an_interrupted_write_leaves_the_old_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_exit_status(tmp_path, 0, "done", "", 10)
    before = (tmp_path / "exit_status.json").read_text()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exit_status.os, "replace", fail)
    assert not write_exit_status(tmp_path, 1, "crash", "error: boom", 11)
    assert (tmp_path / "exit_status.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_old_status_is_told_from_one_of_this_run(tmp_path: Path) -> None:
    assert not has_exit_status_since(tmp_path, 0.0)
    write_exit_status(tmp_path, 0, "done", "", 10)
    written = (tmp_path / "exit_status.json").stat().st_mtime
    assert has_exit_status_since(tmp_path, written)
    assert not has_exit_status_since(tmp_path, written + 1)
    clear_exit_status(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_records_come_back_by_rank_and_torn_ones_count_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = FailureRecord(2, "error: no", None, 12.5, 3, (10, 9), "/save", 4)
    monkeypatch.delenv(exit_status.LAUNCH_DIRECTORY_VARIABLE, raising=False)
    assert not leave_record(record)
    monkeypatch.setenv(exit_status.LAUNCH_DIRECTORY_VARIABLE, str(tmp_path))
    assert leave_record(record)
    (tmp_path / "rank_0.json").write_text('{"exit_code": 1, "mess')
    assert read_records(tmp_path) == {3: record}
