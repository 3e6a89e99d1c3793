"""One setting of a run: its name, type, default, spellings on the command line and help text.

A dataclass field becomes a `Setting` here; `config/command_line.py` turns settings into argparse groups.
Rules: `bool` that is false gets `--name`, one that is true gets `--no-name` (and the opposite, unseen, to undo a
file's), `bool | None` (decided while building) gets both; a `Literal` or an enum gives the choices; a tuple or list takes several words.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_let.config.docstrings import field_docstrings


@dataclass(frozen=True)
class ValueType:
    """What one value of a setting may be."""

    base: type
    """int, float, str, bool or an enum class."""
    choices: tuple[Any, ...] | None = None
    """Allowed values; names of the members for an enum."""
    count: int | str | None = None
    """None for a single value, "+" for one or more, a number for exactly that many."""
    may_be_none: bool = False
    """Whether None (not given, decided later) is a value."""

    @property
    def is_switch(self) -> bool:
        """Return whether the setting is turned on and off and takes no word."""
        return self.base is bool


@dataclass(frozen=True)
class Setting:
    """A named setting as the command line, the YAML file, the log and the documentation see it."""

    dest: str
    """Megatron-LM's name of the value: the key in YAML and in the printed settings."""
    value_type: ValueType
    default: Any
    on_flags: tuple[str, ...]
    """Spellings that set a value or turn a switch on; the first is the usual one."""
    off_flags: tuple[str, ...]
    """Spellings that turn a switch off."""
    help: str
    group: str
    """Heading in --help and in docs/flags.md."""
    opposites: tuple[str, ...] = ()
    """Spellings that turn a switch back to its default; --help leaves them out."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Return every spelling that --help shows; empty for a value that is only derived."""
        return self.on_flags + self.off_flags

    @property
    def spellings(self) -> tuple[str, ...]:
        """Return every spelling that is understood."""
        return self.flags + self.opposites


def with_opposites(setting: Setting, taken: Container[str]) -> Setting:
    """Return a setting whose switch can be turned back where a --config file has turned it: --no-bf16 for --bf16.

    A switch that has both kinds of flags needs none; flags in `taken` are another setting's.
    """
    if not setting.value_type.is_switch or (setting.on_flags and setting.off_flags):
        return setting
    opposites = (_opposite(flag) for flag in setting.flags)
    return replace(setting, opposites=tuple(flag for flag in opposites if flag not in taken))


def _opposite(flag: str) -> str:
    return (
        f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else f"--no-{flag.removeprefix('--')}"
    )


def option(
    default: Any,
    *,
    flags: tuple[str, ...] | None = None,
    off_flags: tuple[str, ...] | None = None,
    dest: str | None = None,
) -> Any:
    """Return a dataclass field with other spellings than the field's name gives; `flags=()` hides it."""
    given = {"flags": flags, "off_flags": off_flags, "dest": dest}
    return field(default=default, metadata={k: v for k, v in given.items() if v is not None})


def filled_later() -> Any:
    """Return a dataclass field that is None only until the command line or `config/derive.py` fills it."""
    return field(default=None)


def value_type_of(annotation: Any, may_be_none: bool = False) -> ValueType:
    """Return the `ValueType` of a field annotation; raise TypeError for one that no word can spell."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Union or origin is types.UnionType:
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"no single type in {annotation}")
        return value_type_of(inner[0], may_be_none or len(inner) < len(arguments))
    if origin is Literal:
        return ValueType(type(arguments[0]), choices=arguments, may_be_none=may_be_none)
    if origin in (list, tuple):
        single = value_type_of(arguments[0])
        open_ended = origin is list or arguments[-1] is Ellipsis
        return ValueType(
            single.base, single.choices, count="+" if open_ended else len(arguments), may_be_none=may_be_none
        )
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return ValueType(annotation, tuple(member.name for member in annotation), may_be_none=may_be_none)
    if annotation in (int, float, str, bool):
        return ValueType(annotation, may_be_none=may_be_none)
    raise TypeError(f"{annotation} cannot be given on a command line")


def setting_of_field(item: dataclasses.Field[Any], annotation: Any, *, docstring: str, group: str) -> Setting:
    """Return the setting that a dataclass field stands for, its metadata honoured."""
    default = item.default
    if default is dataclasses.MISSING:
        factory = item.default_factory
        default = factory() if factory is not dataclasses.MISSING else None
    value_type = value_type_of(annotation, may_be_none=default is None)
    on_flags, off_flags = _spellings(item, value_type, default)
    return Setting(
        dest=item.metadata.get("dest", item.name),
        value_type=value_type,
        default=default,
        on_flags=on_flags,
        off_flags=off_flags,
        help=item.metadata.get("help", docstring),
        group=group,
    )


def settings_of(cls: type, group: str) -> tuple[Setting, ...]:
    """Return the settings of every field of dataclass `cls`, in its order."""
    hints = get_type_hints(cls)
    docstrings = field_docstrings(cls)
    return tuple(
        setting_of_field(item, hints[item.name], docstring=docstrings.get(item.name, ""), group=group)
        for item in dataclasses.fields(cls)
    )


def section_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of `cls` out of `values`, which maps dest to value."""
    return {item.name: values[item.metadata.get("dest", item.name)] for item in dataclasses.fields(cls)}


def _spellings(
    item: dataclasses.Field[Any], value_type: ValueType, default: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the flags that set a value or switch on, and those that switch off."""
    name = item.metadata.get("dest", item.name).replace("_", "-")
    has_on = not value_type.is_switch or default is not True
    has_off = value_type.is_switch and default is not False
    on_flags = (f"--{name}",) if has_on else ()
    off_flags = (f"--no-{name}",) if has_off else ()
    return (
        item.metadata.get("flags", on_flags) if has_on else (),
        item.metadata.get("off_flags", off_flags) if has_off else (),
    )
