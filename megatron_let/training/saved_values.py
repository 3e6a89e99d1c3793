"""What the checks of a checkpoint's plain values share: one of them looked at, and the line when it is not right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_let.errors import ConfigError
from megatron_let.plain_json import fits, shown


def require_vocabulary(run: dict[str, Any]) -> None:
    """Raise KeyError or ValueError unless the vocabulary's size and the tokenizer are there."""
    require_value("vocab_size", run["vocab_size"], int)
    require_value("tokenizer_fingerprint", run["tokenizer_fingerprint"], str | None)
    require_value(
        "encoding_fingerprint", run.get("encoding_fingerprint"), str | None
    )  # later than the others


def incomplete(directory: Path, error: Exception) -> ConfigError:
    """Return the line about a checkpoint whose plain values are not what this version writes."""
    what = f"it has no {shown(error.args[0])}" if isinstance(error, KeyError) else shown(str(error), 200)
    return ConfigError(
        f"checkpoint {directory} is incomplete or was not written by this version of megatron_let ({what}); give another"
    )


def require_value(name: str, value: Any, annotation: Any) -> None:
    """Raise ValueError unless a value is of the type that `annotation` names."""
    if not fits(value, annotation):
        raise ValueError(f"{name} is {shown(value)}")
