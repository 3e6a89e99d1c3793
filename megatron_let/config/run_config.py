"""Every setting of a run in one frozen object, to and from plain values, and as a readable page."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, get_type_hints

import yaml

from megatron_let.config.checkpoint import CheckpointConfig
from megatron_let.config.data import DataConfig
from megatron_let.config.let import LetConfig
from megatron_let.config.logging import LoggingConfig
from megatron_let.config.model import ModelConfig, TokenizerConfig
from megatron_let.config.parallel import ParallelConfig
from megatron_let.config.setting import (
    Setting,
    section_values,
    settings_of,
    value_type_of,
    with_opposites,
)
from megatron_let.config.training import ScheduleConfig, TrainingConfig, ValidationConfig
from megatron_let.errors import ConfigError
from megatron_let.plain_json import fits, shown


class CoreSections(NamedTuple):
    """The three settings classes made from megatron-core's dataclasses (`mcore/settings.py`)."""

    transformer: type[Any]
    optimizer: type[Any]
    ddp: type[Any]


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. A section's field is named like Megatron-LM's argument or megatron-core's field."""

    model: ModelConfig
    transformer: Any
    parallel: ParallelConfig
    ddp: Any
    training: TrainingConfig
    optimizer: Any
    schedule: ScheduleConfig
    validation: ValidationConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    let: LetConfig

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return section -> field -> plain value (JSON: tuples as lists, enum members by name)."""
        return {
            section: {
                item.name: _to_plain(getattr(getattr(self, section), item.name))
                for item in dataclasses.fields(getattr(self, section))
            }
            for section in _sections()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]], core: CoreSections) -> RunConfig:
        """Return the config that `to_dict` wrote; a field it lacks has its default, an unknown one is an error.

        Raises:
            ConfigError: an unknown field.
            ValueError: a value of another type.
        """
        sections = {}
        if not fits(values, dict[str, dict[str, Any]]):
            raise ValueError(f"{shown(values)} as settings")
        for section, section_class in section_classes(core).items():
            hints = get_type_hints(section_class)
            given = values.get(section, {})
            unknown = sorted(set(given) - {item.name for item in dataclasses.fields(section_class)})
            if unknown:
                raise ConfigError(
                    f"saved settings have unknown names in section {section}: {shown(', '.join(unknown))}"
                )
            sections[section] = section_class(
                **{name: _from_plain(value, hints[name]) for name, value in given.items()}
            )
        return cls(**sections)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], core: CoreSections) -> RunConfig:
        """Return the config whose settings are `values` (dest -> value); a shared dest fills every section."""
        return cls(
            **{
                section: section_class(**section_values(section_class, values))
                for section, section_class in section_classes(core).items()
            }
        )

    def to_yaml(self) -> str:
        """Return the settings as a page that people read and `--config` takes: one line a value, by section."""
        lines: list[str] = []
        seen: set[str] = set()
        for section in _sections():
            lines.append(f"# {section}")
            for item in dataclasses.fields(getattr(self, section)):
                dest = item.metadata.get("dest", item.name)
                value = _to_plain(getattr(getattr(self, section), item.name))
                if dest in seen or value is None:
                    continue
                seen.add(dest)
                derived = "# " if item.metadata.get("flags") == () else ""
                lines.append(f"{derived}{dest}: {_yaml_scalar(value)}")
        return "\n".join(lines) + "\n"


GROUP_TITLES: tuple[tuple[str, str], ...] = (
    ("let", "LET"),
    ("model", "model"),
    ("transformer", "transformer (megatron-core)"),
    ("parallel", "parallelism"),
    ("ddp", "data parallelism (megatron-core)"),
    ("training", "training"),
    ("optimizer", "optimizer (megatron-core)"),
    ("schedule", "learning rate and weight decay"),
    ("validation", "validation"),
    ("data", "data"),
    ("tokenizer", "tokenizer"),
    ("checkpoint", "checkpoints"),
    ("logging", "logging"),
)
"""Sections in the order of --help, with their headings."""


def section_classes(core: CoreSections) -> dict[str, type[Any]]:
    """Return section -> dataclass."""
    hints = get_type_hints(RunConfig)
    return {name: getattr(core, name, hints[name]) for name in _sections()}


@cache
def all_settings(core: CoreSections) -> tuple[Setting, ...]:
    """Return every setting once, in the order of --help; a dest that sections share belongs to the first."""
    found: dict[str, Setting] = {}
    classes = section_classes(core)
    for section, title in GROUP_TITLES:
        for setting in settings_of(classes[section], title):
            found.setdefault(setting.dest, setting)
    taken = {flag for setting in found.values() for flag in setting.flags}
    return tuple(with_opposites(setting, taken) for setting in found.values())


def _sections() -> Iterator[str]:
    """Yield the names of the sections."""
    return (item.name for item in dataclasses.fields(RunConfig))


def _to_plain(value: Any) -> Any:
    """Return `value` as JSON can hold it."""
    if isinstance(value, enum.Enum):
        return value.name
    return list(value) if isinstance(value, tuple) else value


def _from_plain(value: Any, annotation: Any) -> Any:
    """Return the value that `_to_plain` wrote for a field of this annotation."""
    if value is None:
        return None
    value_type = value_type_of(annotation)
    if (value_type.count is not None) != isinstance(value, list | tuple):
        raise ValueError(f"{shown(value)} as {value_type.base.__name__}")
    if isinstance(value, list | tuple):
        return tuple(_item_from_plain(item, value_type.base) for item in value)
    return _item_from_plain(value, value_type.base)


def _item_from_plain(value: Any, base: type[Any]) -> Any:
    if issubclass(base, enum.Enum) and value in base.__members__:
        return base[value]
    kinds = (int, float) if base is float else (base,)
    if type(value) not in kinds:
        raise ValueError(f"{shown(value)} as {base.__name__}")
    return value


def _yaml_scalar(value: Any) -> str:
    """Return one value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()
