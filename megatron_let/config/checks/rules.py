"""What the rules are written with: a requirement, and settings that cannot take effect."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_let.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Packages:
    """Optional packages that are installed."""

    transformer_engine: bool
    apex: bool
    tensorboard: bool = True
    wandb: bool = True


def require(is_met: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the requirement is met."""
    if not is_met:
        raise ConfigError(message)


def flag_of(section: Any, name: str) -> str:
    """Return the usual spelling of the flag that sets field `name` of a section."""
    metadata = next(item.metadata for item in dataclasses.fields(section) if item.name == name)
    flags = metadata.get("flags") or metadata.get("off_flags")
    return str(flags[0]) if flags else f"--{metadata.get('dest', name).replace('_', '-')}"


def given(section: Any, *names: str) -> list[str]:
    """Return the flags of those fields whose value is not their default."""
    defaults = {item.name: item.default for item in dataclasses.fields(section)}
    return [flag_of(section, name) for name in names if getattr(section, name) != defaults[name]]


def require_takes_effect(section: Any, *names: str, needs: str) -> None:
    """Raise ConfigError when one of the fields is set although it cannot take effect without `needs`."""
    useless = given(section, *names)
    require(
        not useless, f"{', '.join(useless)} cannot take effect without {needs}; add it or leave the flag out"
    )


def require_divisible(number: int, by: int, what: str, by_what: str, hint: str) -> None:
    """Raise ConfigError unless `number` (named `what`) is a multiple of `by` (named `by_what`)."""
    require(number % by == 0, f"{what} {number} is not a multiple of {by_what} {by}; {hint}")
