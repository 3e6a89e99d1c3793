"""The rows of a run on TensorBoard and Weights & Biases, one curve over all its starts."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_let.config.logging import LoggingConfig
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.regular_files import MIB, read_text
from megatron_let.training.checkpoint_files import write_atomically
from megatron_let.training.metrics import Row
from megatron_let.training.patient_sink import PatientSink

WANDB_ID_FILE = "wandb_run_id.txt"
"""In the save directory: the W&B run that its starts share."""
_LONGEST_ID = 128
_ROOM_BYTES = 64 << 10
"""More than the events of a row take."""


class TensorBoard:
    """TensorBoard events, one scalar a field, and the settings as text."""

    def __init__(self, directory: str, *, resumed_iteration: int = 0, settings: str = "") -> None:
        """Open an event file; of earlier ones in the directory TensorBoard shows nothing past `resumed_iteration`."""
        from torch.utils.tensorboard import SummaryWriter

        self._directory = Path(directory)
        try:
            self._writer = SummaryWriter(directory, purge_step=resumed_iteration + 1)
        except OSError as problem:
            raise ConfigError(f"--tensorboard-dir {directory}: {problem.strerror or problem}") from problem
        if settings:
            self._writer.add_text("settings", f"```yaml\n{settings}```", resumed_iteration + 1)

    def write(self, row: Row) -> None:
        """Write every number of the row at its iteration, at once.

        Raises:
            OSError: there is no room; on a full disk the writer's thread would die, with a traceback.
        """
        _require_room(self._directory)
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row.iteration)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run: the same one for every start of a save directory."""

    def __init__(self, logging: LoggingConfig, settings: dict[str, Any], save: Path | None = None) -> None:
        """Start the run, or go on with the one that `save` remembers; WANDB_RUN_ID in the environment comes first."""
        import wandb

        run_id = None if save is None or "WANDB_RUN_ID" in os.environ else _remembered_id(save)
        try:
            self._run = wandb.init(
                project=logging.wandb_project,
                entity=logging.wandb_entity,
                name=logging.wandb_exp_name,
                dir=logging.wandb_save_dir,
                config=settings,
                id=run_id,
                resume="allow",
            )
        except wandb.Error as problem:  # no key, no network, no such entity
            reason = " ".join(str(problem).split())
            raise ConfigError(
                f"--wandb-project {logging.wandb_project}: {reason}; or set WANDB_MODE=offline"
            ) from problem
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            write_atomically(save / WANDB_ID_FILE, f"{self._run.id}\n")

    def write(self, row: Row) -> None:
        """Log every number of the row at its iteration; W&B leaves out a step that it has already."""
        self._run.log(_scalars(row), step=row.iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_dashboards(config: RunConfig, resumed_iteration: int) -> list[PatientSink]:
    """Return those that the settings ask for; one that cannot be written later stops no run.

    Raises:
        ConfigError: one cannot be opened.
    """
    logging, save = config.logging, config.checkpoint.save
    found = []
    if logging.tensorboard_dir is not None:
        board = TensorBoard(
            logging.tensorboard_dir, resumed_iteration=resumed_iteration, settings=config.to_yaml()
        )
        found.append(PatientSink("TensorBoard's event file", board))
    if logging.wandb_project is not None:
        run = WeightsAndBiases(logging, config.to_dict(), None if save is None else Path(save))
        found.append(PatientSink("W&B's run", run))
    return found


def _remembered_id(save: Path) -> str | None:
    """Return the id of the W&B run of a save directory, None where there is none to be read."""
    try:
        return read_text(save / WANDB_ID_FILE, errors="replace", limit=MIB).strip()[:_LONGEST_ID] or None
    except OSError:
        return None


def _require_room(directory: Path) -> None:
    """Raise OSError unless `directory` takes as many bytes as a row may need."""
    probe = directory / f".room.{os.getpid()}"
    try:
        probe.write_bytes(bytes(_ROOM_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def _scalars(row: Row) -> dict[str, float]:
    values = asdict(row)
    return {name: float(value) for name, value in values.items() if value is not None and name != "iteration"}
