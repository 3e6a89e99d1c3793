"""Rows of a run: what is written, what a killed run leaves, what the log line prints."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.derive import resolve
from megatron_let.errors import EXIT_PREEMPTED
from megatron_let.mcore.parallel import parallel_context
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.one_iteration import run_one_iteration
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.dashboards import TensorBoard
from megatron_let.training.metrics import (
    METRICS_FILE,
    JsonLines,
    Row,
    TrainingRow,
    ValidationRow,
    drop_rows_past,
    format_training_row,
    format_validation_row,
)
from megatron_let.training.signals import StopRequest

ROW = TrainingRow(
    iteration=7,
    consumed_samples=56,
    consumed_tokens=1792,
    lm_loss=4.5,
    let_loss=-0.25,
    let_cosine=0.25,
    let_cosine_centered=0.125,
    let_weight=0.1,
    grad_norm=1.5,
    num_zeros_in_grad=None,
    params_norm=None,
    learning_rate=3e-3,
    global_batch_size=8,
    loss_scale=1.0,
    skipped_iterations=2,
    nan_iterations=0,
    iteration_ms=12.5,
    tokens_per_second=2000.0,
    tokens_per_second_per_device=1000.0,
    tflops_per_device=0.5,
    mfu=None,
    elapsed_seconds=3.5,
)
VALIDATION = ValidationRow(
    iteration=7, consumed_samples=56, consumed_tokens=1792, validation_lm_loss=2.0, elapsed_seconds=3.5
)


def line_of(**changes: Any) -> str:
    return format_training_row(dataclasses.replace(ROW, **changes), train_iters=20, eta_seconds=61.4)


def columns(line: str) -> dict[str, str]:
    """Read a log line as Megatron's own scripts do: `name: value` between bars."""
    parts = [part.strip() for part in line.strip().strip("|").split("|")]
    return dict(part.split(": ", 1) for part in parts if ": " in part)


def test_the_log_line_has_megatrons_columns_then_lets() -> None:
    line = line_of()
    assert "iteration        7/      20 |" in line
    assert columns(line) == {
        "consumed samples": "          56",
        "elapsed time per iteration (ms)": "12.5",
        "learning rate": "3.000000E-03",
        "global batch size": "    8",
        "lm loss": "4.500000E+00",
        "loss scale": "1.0",
        "grad norm": "1.500",
        "number of skipped iterations": "  2",
        "number of nan iterations": "  0",
        "let cosine": "0.2500",
        "let weight": "0.1",
        "tokens/s/device": "1000",
        "TFLOP/s/device": "0.5",
        "ETA": "0:01:01",
    }


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (math.nan, "NAN"),
        (math.inf, "INF"),
        (-math.inf, "-INF"),
        (0.0, "0.000000E+00"),
        (-1.5, "-1.500000E+00"),
    ],
)
def test_every_loss_is_printed_and_written(loss: float, shown: str, tmp_path: Path) -> None:
    """Megatron's own line leaves out losses that are negative, zero or not a number."""
    assert columns(line_of(lm_loss=loss))["lm loss"] == shown
    assert columns(line_of(let_cosine=loss))["let cosine"].upper().startswith(shown[:4])
    sink = JsonLines(tmp_path, resumed_iteration=0)
    sink.write(dataclasses.replace(ROW, lm_loss=loss, let_loss=loss, grad_norm=loss))
    sink.close()
    row = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=_refuse)
    assert row["lm_loss"] == (loss if math.isfinite(loss) else str(loss))
    assert row["let_loss"] == row["grad_norm"] == row["lm_loss"]
    assert f"lm loss value: {shown}" in format_validation_row(
        dataclasses.replace(VALIDATION, validation_lm_loss=loss)
    )


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_what_does_not_exist_is_left_out_of_the_line_and_null_in_the_file(tmp_path: Path) -> None:
    plain = dataclasses.replace(
        ROW, let_loss=None, let_cosine=None, let_cosine_centered=None, let_weight=None, grad_norm=None
    )
    line = format_training_row(plain, train_iters=20, eta_seconds=0)
    assert "let" not in line.replace("iteration", "")
    assert columns(line)["grad norm"] == "n/a"
    assert "num zeros" not in columns(line)
    assert columns(line_of(num_zeros_in_grad=12))["num zeros"] == "12"
    assert columns(line_of(mfu=0.42))["MFU"] == "42.0%"
    sink = JsonLines(tmp_path, resumed_iteration=0)
    sink.write(plain)
    sink.close()
    assert json.loads((tmp_path / METRICS_FILE).read_text()) == dataclasses.asdict(plain)


def test_a_resume_drops_torn_lines_and_rows_past_it(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    rows = [{"iteration": i, "lm_loss": 1.0} for i in (1, 2, 3)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(2, json.dumps({"iteration": 2, "validation_lm_loss": 2.0}))
    torn = '{"iteration": 2, "lm_l'
    path.write_text("\n".join([*lines, "[1, 2]", "7", '{"no": "iteration"}', torn]))
    drop_rows_past(path, 2)
    assert path.read_text() == "\n".join(lines[:3]) + "\n"
    drop_rows_past(path, 2, keep_validation=False)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"


@pytest.mark.parametrize("tail", [b"\xff\xfe\x00", b'{"iteration": 1', b"\n\n", b"NaN\n", b""])
def test_whatever_a_kill_left_the_next_row_stands_on_a_line_of_its_own(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"iteration": 1, "lm_loss": 1.0}\n' + tail)
    sink = JsonLines(tmp_path, resumed_iteration=5)
    sink.write(ROW)
    sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 7]


def test_a_fresh_run_forgets_the_rows_of_an_earlier_one(tmp_path: Path) -> None:
    for iteration in (1, 2):
        sink = JsonLines(tmp_path, resumed_iteration=0)
        sink.write(dataclasses.replace(ROW, iteration=iteration))
        sink.close()
    assert [json.loads(line)["iteration"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [
        2
    ]


def test_each_row_is_on_disk_when_it_is_written(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path, resumed_iteration=0)
    sink.write(ROW)
    sink.write(VALIDATION)
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row.get("validation_lm_loss") for row in rows] == [None, 2.0]
    sink.close()


def test_tensorboard_gets_the_same_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    sink = TensorBoard(str(tmp_path))
    sink.write(ROW)
    sink.write(VALIDATION)
    sink.close()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for name in ("lm_loss", "let_cosine", "grad_norm", "validation_lm_loss"):
        assert name.encode() in written
    assert b"mfu" not in written


class _Closed:
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def write(self, row: Row) -> None:
        self.told.append(type(row).__name__)

    def close(self) -> None:
        self.told.append("close")


def run_with_a_sink(argv: list[str]) -> tuple[int, list[str]]:
    """Train on this rank; return the exit code and what the sink was told."""
    config = resolve(parse_arguments(argv), 1)
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        sink = _Closed()
        reporter = dataclasses.replace(trainer.run.reporter, sinks=(sink,))
        trainer.run = dataclasses.replace(trainer.run, reporter=reporter)
        return trainer.fit(), sink.told


def test_sinks_are_closed_also_when_the_run_is_cut_short(pool: RankPool) -> None:
    changes = {"--mock-data": None, "--micro-batch-size": 8, "--exit-interval": 2}
    ((code, told),) = pool.run(1, run_with_a_sink, arguments(TINY_STUDENT, changes))
    assert code == EXIT_PREEMPTED
    assert told == ["TrainingRow", "TrainingRow", "close"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_zeros_in_the_gradient_are_counted_when_asked_for(world_size: int, pool: RankPool) -> None:
    words = arguments(
        TINY_STUDENT,
        {"--mock-data": None, "--train-iters": False, "--tensor-model-parallel-size": world_size},
    )
    asked = pool.run(world_size, run_one_iteration, [*words, "--log-num-zeros-in-grad"])[0]
    expected = sum(int((gradient == 0).sum()) for gradient in asked.gradients.values())
    assert expected > 48 * 11, "rows of padding have none"
    assert asked.row is not None
    assert asked.row.num_zeros_in_grad == expected
    silent = pool.run(world_size, run_one_iteration, words)[0]
    assert silent.row is not None
    assert silent.row.num_zeros_in_grad is None
