"""What LET is in a run, as the checkpoint remembers it, and what may change on resume."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_let.config.let import LetConfig
from megatron_let.config.run_config import RunConfig
from megatron_let.data.digests import add_samples
from megatron_let.errors import ConfigError
from megatron_let.exit_status import EXIT_STATUS_FILE
from megatron_let.let import LetSchedule, default_student_layer, resolve_stop
from megatron_let.let.schedule import DEFAULT_STOP_FRACTION
from megatron_let.plain_json import require_fields, shown
from megatron_let.training.teacher_bos import teacher_bos
from megatron_let.training.teachers import teacher_dtype, teacher_files

# Files of a teacher directory that decide what it computes.
_IDENTITY_SUFFIXES = (".safetensors", ".distcp", ".pt", ".json", ".metadata")
_SAMPLES = 32


@dataclass(frozen=True)
class LetRecord:
    """LET's settings with every default resolved; S_stop is an absolute iteration."""

    student_layer: int
    teacher_layer: int | None
    weight: float
    stop_iteration: int
    stop_fraction: float | None
    loss: str
    projection: str
    teacher_dtype: str
    teacher_identity: str | None
    teacher_bos: int | None = None
    """Id before each of the teacher's segments; checkpoints that do not say it were trained without."""

    def schedule(self) -> LetSchedule:
        """Return the weight over the iterations."""
        return LetSchedule(self.weight, self.stop_iteration)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return asdict(self)


def require_let(saved: Any) -> None:
    """Raise ValueError unless these are a record's plain values; older checkpoints have no `teacher_bos`."""
    require_fields(LetRecord, {"teacher_bos": None, **saved} if isinstance(saved, dict) else saved)


def teacher_identity(directory: Path) -> str:
    """Return a fingerprint of a teacher's files: names, sizes and 32 evenly spaced 64-KiB samples of each.

    Sampling keeps it under a second for any size; it tells another model, another training state of the same
    model and a re-saved one apart, and does not depend on the path.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if not path.is_file() or not path.name.endswith(_IDENTITY_SUFFIXES) or "tokenizer" in path.name:
            continue
        if path.name == EXIT_STATUS_FILE:  # says how a run ended that was told to save here
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        add_samples(digest, path, _SAMPLES)
    return digest.hexdigest()


def reconcile(
    saved: dict[str, Any] | None, current: LetRecord | None, *, completed_iterations: int, let: LetConfig
) -> LetRecord | None:
    """Return the record a resumed run goes on with.

    A stop given as a fraction keeps the absolute iteration it was resolved to when the run began, so that a longer
    `--train-iters` does not move it, and the teacher's bos stays what it was unless the flag says otherwise. Once S_stop has
    passed, the teacher itself is not compared: it may be gone.

    Raises:
        ConfigError: a setting differs from the checkpoint's and `--let-override` is not given.
    """
    if let.let_override:
        return current
    if saved is None and current is None:
        return None
    if saved is None or current is None:
        was, now = ("with", "without") if current is None else ("without", "with")
        raise ConfigError(
            f"the checkpoint was trained {was} a LET teacher and this run goes on {now} one; "
            "give the same --let-* flags, or --let-override to accept the change"
        )
    saved = {"teacher_bos": None, **saved}
    values = current.to_dict()
    if let.let_teacher_bos == "auto":
        values["teacher_bos"] = saved["teacher_bos"]
    if values["stop_iteration"] == saved["stop_iteration"]:
        values["stop_fraction"] = saved["stop_fraction"]  # the same iteration, said in another way
    elif saved["stop_fraction"] is not None and saved["stop_fraction"] == values["stop_fraction"]:
        values["stop_iteration"] = saved["stop_iteration"]
    if completed_iterations >= saved["stop_iteration"]:
        values |= {name: saved[name] for name in ("teacher_identity", "teacher_bos")}
    elif values["teacher_identity"] is None and saved["teacher_identity"] is not None:
        raise ConfigError(
            f"--let-teacher-load {let.let_teacher_load} holds no teacher, which the run needs until iteration "
            f"{saved['stop_iteration']} (the checkpoint is of {completed_iterations}); give back its directory"
        )
    for name, value in values.items():
        if saved[name] != value:
            raise ConfigError(
                f"LET setting {name.replace('_', ' ')} is {value} but the checkpoint was trained with {shown(saved[name])}; "
                "give the checkpoint's value, or --let-override to accept the change"
            )
    return LetRecord(**values)


def student_layer_of_run(config: RunConfig) -> int:
    """Return k, the layer whose output is aligned, 1-based."""
    return config.let.let_student_layer or default_student_layer(config.transformer.num_layers)


def stop_of_run(let: LetConfig, total_iterations: int) -> tuple[int, float | None]:
    """Return S_stop and the share of the run that it was given as, None where it was given in iterations.

    Raises:
        ConfigError: it is outside the run.
    """
    fraction = let.let_stop_fraction
    if fraction is None and let.let_stop_iters is None:
        fraction = DEFAULT_STOP_FRACTION
    stop = resolve_stop(total_iterations, stop_iters=let.let_stop_iters, stop_fraction=fraction)
    return stop, fraction


def record_of_run(config: RunConfig, saved: dict[str, Any] | None, total_iterations: int) -> LetRecord | None:
    """Resolve LET's settings, and on resume hold them against those of the checkpoint, `saved`; None without LET.

    Raises:
        ConfigError: S_stop is outside the run, or a setting differs from the checkpoint's.
    """
    let, current = config.let, None
    completed = 0 if saved is None or config.checkpoint.finetune else saved["state"]["iteration"]
    if let.is_on:
        stop, fraction = stop_of_run(let, total_iterations)
        files = teacher_files(Path(str(let.let_teacher_load)))
        current = LetRecord(
            student_layer=student_layer_of_run(config),
            teacher_layer=let.let_teacher_layer,
            weight=let.let_weight,
            stop_iteration=stop,
            stop_fraction=fraction,
            loss=let.let_loss,
            projection=let.let_projection,
            teacher_dtype=str(teacher_dtype(config)).removeprefix("torch."),
            teacher_identity=None if files is None else teacher_identity(files),
            teacher_bos=None if files is None else teacher_bos(config),
        )
    if saved is None or config.checkpoint.finetune:
        return current
    return reconcile(saved["let"], current, completed_iterations=completed, let=let)
