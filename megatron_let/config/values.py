"""Words of a command line and values of a YAML file, checked against the type of a setting."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Sequence
from typing import Any

from megatron_let.config.setting import Setting, ValueType
from megatron_let.errors import ConfigError
from megatron_let.plain_json import quoted, shown

_INTEGER = re.compile(r"[+-]?\d+")


def value_from_words(setting: Setting, flag: str, words: Sequence[str]) -> Any:
    """Return the value that `flag` followed by `words` sets; raise ConfigError naming what it takes."""
    value_type = setting.value_type
    if value_type.is_switch:
        if words:
            raise ConfigError(f"{flag} is a switch and takes no value, got {' '.join(words)}")
        return setting.default if flag in setting.opposites else flag in setting.on_flags
    if value_type.count is None:
        if len(words) != 1:
            raise ConfigError(f"{flag} takes one value ({expected(value_type)}), got {_listed(words)}")
        return _from_word(value_type, flag, words[0])
    _check_count(value_type, flag, words)
    return tuple(_from_word(value_type, flag, word) for word in words)


def value_from_yaml(setting: Setting, key: str, value: Any) -> Any:
    """Return the value of `key: value`, types taken strictly; raise ConfigError naming what it takes.

    A flag that switches off (`no-x: true`) is understood, and leaves the default when it is false; as is `1e-4`, which
    YAML 1.1 reads as text.
    """
    value_type = setting.value_type
    if value is None and setting.default is None:
        return None
    if value_type.is_switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} in the config file is true or false, got {quoted(value)}")
        flag = f"--{key.replace('_', '-')}"
        if flag in setting.off_flags:
            return False if value else setting.default
        return value
    if value_type.count is None:
        return _from_yaml_value(value_type, key, value)
    values = value if isinstance(value, list) else [value]
    _check_count(value_type, key, values)
    if value_type.base is str:
        values = [str(item) if isinstance(item, int | float) else item for item in values]
    return tuple(_from_yaml_value(value_type, key, item) for item in values)


def expected(value_type: ValueType) -> str:
    """Return in words what one value may be."""
    if value_type.choices is not None:
        return "one of " + ", ".join(str(choice) for choice in value_type.choices)
    names: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names[value_type.base]


def _from_word(value_type: ValueType, flag: str, word: str) -> Any:
    """Return one word as a value."""
    if value_type.choices is not None:
        return _choice(value_type, flag, word)
    if value_type.base is int and _INTEGER.fullmatch(word):
        return int(word)
    if value_type.base is float:
        return _finite(flag, word)
    if value_type.base is str:
        return _text(flag, word)
    raise ConfigError(f"{flag} takes {expected(value_type)}, got {quoted(word)}")


def _from_yaml_value(value_type: ValueType, key: str, value: Any) -> Any:
    """Return one YAML value as a value."""
    if value_type.choices is not None and not isinstance(value, bool):
        return _choice(value_type, key, str(value))
    if value_type.base is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _finite(key, str(value))
    if isinstance(value, str) and value_type.base is str:
        return _text(key, value)
    if type(value) is value_type.base:
        return value
    hint = "; quote it" if value_type.base is str else ""
    raise ConfigError(f"{key} in the config file takes {expected(value_type)}, got {quoted(value)}{hint}")


def _choice(value_type: ValueType, name: str, word: str) -> Any:
    """Return the allowed value that `word` spells."""
    for choice in value_type.choices or ():
        if str(choice) == word:
            return value_type.base[word] if issubclass(value_type.base, enum.Enum) else choice
    raise ConfigError(f"{name} is {expected(value_type)}, got {quoted(word)}")


def _text(name: str, word: str) -> str:
    """Return `word` unless it is empty, which as a path would mean the current directory."""
    if not word.strip():
        raise ConfigError(
            f"{name} takes text, got {quoted(word)}; is a shell variable unset? Otherwise leave it out"
        )
    return word


def _finite(name: str, word: str) -> float:
    """Return `word` as a finite number."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} takes a number, got {quoted(word)}")
    return number


def _check_count(value_type: ValueType, name: str, values: Sequence[Any]) -> None:
    """Raise ConfigError unless there are as many values as the setting takes."""
    if value_type.count == "+" and values:
        return
    if value_type.count != len(values):
        wanted = "at least one value" if value_type.count == "+" else f"{value_type.count} values"
        raise ConfigError(f"{name} takes {wanted} ({expected(value_type)} each), got {_listed(values)}")


def _listed(values: Sequence[Any]) -> str:
    """Return what was given, in words."""
    return shown(" ".join(map(shown, values[:20]))) if values else "none"
