"""Are the plain values of a checkpoint those that a run of this version writes? Looked at once, before any is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_let.plain_json import fits, require_fields
from megatron_let.training.data_record import DataRecord
from megatron_let.training.let_record import require_let
from megatron_let.training.saved_values import incomplete, require_value, require_vocabulary
from megatron_let.training.state import TrainingState

# Settings that a load looks up, by section; what else a checkpoint has or lacks may differ between versions.
_LOOKED_UP: dict[str, dict[str, Any]] = {
    "transformer": {
        "tensor_model_parallel_size": int,
        "pipeline_model_parallel_size": int,
        "fp16": bool,
        "bf16": bool,
    },
    "ddp": {"use_distributed_optimizer": bool},
    "checkpoint": {"no_save_rng": bool, "no_save_optim": bool},
    "optimizer": {"optimizer": str, "decoupled_lr": float | None, "decoupled_min_lr": float | None},
    "schedule": {"lr_decay_iters": int | None, "lr_decay_samples": int | None},
    "training": {"train_iters": int | None, "train_samples": int | None},
    "model": {},
}
_ORIGIN = 4
"""Numbers of an entry of the order: the sample's, and where it comes from."""


def with_consumed_tokens(run: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of its run with the tokens consumed, which the first versions did not count.

    They are then taken to be of one sequence length. Values of another kind are left to `require_run`.
    """
    state, config = run.get("state"), run.get("config")
    if not isinstance(state, dict) or not isinstance(config, dict) or "consumed_tokens" in state:
        return run
    model = config.get("model")
    samples = state.get("consumed_samples")
    length = model.get("seq_length") if isinstance(model, dict) else None
    if not (isinstance(samples, int) and isinstance(length, int) and fits([samples, length], list[int])):
        return run
    return {**run, "state": {**state, "consumed_tokens": samples * length}}


def require_run(run: dict[str, Any], directory: Path) -> None:
    """Check what a checkpoint says of its run, the scheduler's state left out.

    Raises:
        ConfigError: a value is missing or of another kind.
    """
    try:
        require_fields(TrainingState, run["state"])
        _require_settings(run["config"])
        require_vocabulary(run)
        if run["let"] is not None:
            require_let(run["let"])
        if run.get("data") is not None:
            require_fields(DataRecord, run["data"])
            if any(len(entry) != _ORIGIN for entry in run["data"]["order"]):
                raise ValueError("the order of the data is damaged")
    except (KeyError, ValueError) as error:
        raise incomplete(directory, error) from error


def _require_settings(config: Any) -> None:
    require_value("config", config, dict[str, dict[str, Any]])
    for section, names in _LOOKED_UP.items():
        for name, annotation in names.items():
            require_value(name, config[section][name], annotation)
        require_value(section, config[section], dict[str, Any])
