"""TensorBoard and W&B over several starts of a run: one curve."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.logging import LoggingConfig
from megatron_let.training.dashboards import WANDB_ID_FILE, TensorBoard, WeightsAndBiases
from megatron_let.training.metrics import ValidationRow

EventAccumulator: Any = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
).EventAccumulator


def row(iteration: int, loss: float = 1.0) -> ValidationRow:
    return ValidationRow(iteration, iteration, iteration, loss, 0.0)


def write_tensorboard(directory: Path, resumed: int, iterations: Sequence[int], loss: float) -> None:
    board = TensorBoard(str(directory), resumed_iteration=resumed, settings=f"lr: {loss}\n")
    for iteration in iterations:
        board.write(row(iteration, loss))
    board.close()


def test_tensorboard_shows_no_rows_past_the_resumed_checkpoint(tmp_path: Path) -> None:
    write_tensorboard(tmp_path, 0, range(1, 11), 1.0)
    write_tensorboard(tmp_path, 4, range(5, 8), 2.0)  # killed after 7
    write_tensorboard(tmp_path, 6, range(7, 9), 3.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("validation_lm_loss")]
    assert found == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (8, 3)]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("settings/text_summary")]
    assert texts == ["```yaml\nlr: 1.0\n```", "```yaml\nlr: 2.0\n```", "```yaml\nlr: 3.0\n```"]


class FakeWandb(types.SimpleNamespace):
    """The part of W&B's client that is used: `init` with an id goes on with that run."""

    Error = RuntimeError

    def __init__(self) -> None:
        super().__init__(runs={}, resumes=[])

    def init(self, *, id: str | None, resume: str, **_: Any) -> Any:
        name = id or f"new{len(self.runs)}"
        logged = self.runs.setdefault(name, {})
        self.resumes.append(resume)
        log = lambda values, step: logged.setdefault(step, values)  # noqa: E731
        return types.SimpleNamespace(id=name, log=log, finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return fake


def start(save: Path | None, iterations: Sequence[int]) -> None:
    board = WeightsAndBiases(LoggingConfig(wandb_project="p"), {}, save)
    for iteration in iterations:
        board.write(row(iteration))
    board.close()


def test_all_starts_of_a_save_directory_are_one_wandb_run(wandb: FakeWandb, tmp_path: Path) -> None:
    start(tmp_path / "run", range(1, 6))
    start(tmp_path / "run", range(4, 9))
    start(tmp_path / "other", [1])
    assert {name: sorted(steps) for name, steps in wandb.runs.items()} == {
        "new0": [*range(1, 9)],
        "new1": [1],
    }
    assert set(wandb.resumes) == {"allow"}


def test_runs_that_save_nothing_are_runs_of_their_own(wandb: FakeWandb) -> None:
    start(None, [1])
    start(None, [1])
    assert len(wandb.runs) == 2


def test_an_id_from_the_environment_is_left_to_wandb(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WANDB_ID_FILE).write_text("remembered\n")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    start(tmp_path, [1])
    assert list(wandb.runs) == ["new0"]  # W&B itself reads the variable


@pytest.mark.parametrize("content", ["", "\n", None])
def test_an_id_that_cannot_be_read_begins_a_new_run(
    content: str | None, wandb: FakeWandb, tmp_path: Path
) -> None:
    if content is None:
        (tmp_path / WANDB_ID_FILE).symlink_to("/dev/zero")
    else:
        (tmp_path / WANDB_ID_FILE).write_text(content)
    start(tmp_path, [1])
    assert (tmp_path / WANDB_ID_FILE).read_text() == "new0\n"
