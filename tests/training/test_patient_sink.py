"""A log on a full disk: the run goes on, the rows wait, and none is lost or written twice."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_let.training.dashboards import TensorBoard
from megatron_let.training.metrics import METRICS_FILE, JsonLines, Row, Sink
from megatron_let.training.patient_sink import PatientSink
from tests.training.bad_input import logged_lines
from tests.training.test_metrics import ROW


def rows(numbers: range) -> list[Row]:
    return [dataclasses.replace(ROW, iteration=number) for number in numbers]


@contextmanager
def no_file_grows_past(size: int) -> Iterator[None]:
    """Let the system refuse what lies beyond, in the middle of a line if it comes so, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def json_iterations(directory: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (directory / METRICS_FILE).read_text().splitlines()]


def tensorboard_iterations(directory: Path) -> list[int]:
    loader = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    (path,) = directory.iterdir()
    events = loader.LegacyEventFileLoader(str(path)).Load()
    return [event.step for event in events if any(value.tag == "lm_loss" for value in event.summary.value)]


def open_tensorboard(directory: Path) -> TensorBoard:
    pytest.importorskip("tensorboard")
    return TensorBoard(str(directory))


LOGS: dict[str, tuple[Callable[[Path], Sink], Callable[[Path], list[int]]]] = {
    "metrics.jsonl": (lambda directory: JsonLines(directory, resumed_iteration=0), json_iterations),
    "TensorBoard": (open_tensorboard, tensorboard_iterations),
}


@pytest.mark.parametrize("log", LOGS)
def test_rows_of_a_full_disk_are_written_when_there_is_room_again(log: str, tmp_path: Path) -> None:
    open_log, iterations = LOGS[log]
    sink = PatientSink("the log", open_log(tmp_path))
    with logged_lines() as lines:
        for row in rows(range(1, 4)):
            sink.write(row)
        (path,) = tmp_path.iterdir()
        with no_file_grows_past(os.stat(path).st_size + 100):
            for row in rows(range(4, 40)):
                sink.write(row)
        for row in rows(range(40, 43)):
            sink.write(row)
        sink.close()
    assert iterations(tmp_path) == list(range(1, 43))
    assert lines == [
        "WARNING the log cannot be written (File too large); the run goes on, and the rows wait until it can be",
        "INFO the log is written again",
    ]


@pytest.mark.parametrize("log", LOGS)
def test_a_disk_that_stays_full_ends_no_run_and_the_lost_rows_are_counted(log: str, tmp_path: Path) -> None:
    open_log, iterations = LOGS[log]
    sink = PatientSink("the log", open_log(tmp_path))
    with logged_lines() as lines:
        sink.write(ROW)
        (path,) = tmp_path.iterdir()
        with no_file_grows_past(os.stat(path).st_size):
            for row in rows(range(8, 12)):
                sink.write(row)
            sink.close()
    assert iterations(tmp_path)[0] == ROW.iteration
    assert lines[-1] == "WARNING the log could not be written to the end; 4 rows are lost"


def test_rows_that_wait_are_bounded(tmp_path: Path) -> None:
    sink = PatientSink("the log", JsonLines(tmp_path, resumed_iteration=0), most_waiting=3)
    with logged_lines() as lines:
        with no_file_grows_past(0):
            for row in rows(range(1, 11)):
                sink.write(row)
        sink.write(ROW)
        sink.close()
    assert lines[-1] == "INFO the log is written again; 7 rows are lost"
    assert json_iterations(tmp_path) == [1, 2, 3, ROW.iteration]
