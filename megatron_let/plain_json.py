"""Plain values out of files that anybody may have written: read strictly, checked, and shown in messages."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from megatron_let.regular_files import read_text

_LONGEST_NUMBER = 40
"""Characters; what a program of this project writes is shorter."""


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: it is not JSON, or holds what no file of this project does: a name twice, a number that is not
            finite or very long, values nested beyond measure. The message is short.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_constant=_not_finite,
            parse_int=_whole_number,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`, or it is not UTF-8 text.
    """
    return parse_json(read_text(path))


def is_name(text: str) -> bool:
    """Return whether a text can be a path or a name: escapes can spell NUL, and half characters."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def require_fields(kind: type[Any], values: Any) -> None:
    """Check that plain values are those that the dataclass `kind` is made of, by its annotations.

    Whole numbers are counts: from 0 to what 64 bits hold.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{shown(values)} in place of a table")
    hints = get_type_hints(kind)
    for name in sorted(hints.keys() | values.keys()):
        if name not in hints or name not in values:
            raise ValueError(f"{shown(name)} is {'unknown' if name not in hints else 'missing'}")
        if not fits(values[name], hints[name]):
            raise ValueError(f"{name} is {shown(values[name])}")


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a plain value is one of this type; lists stand for tuples, and whole numbers are counts."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in arguments)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping, Counter):
        inner = arguments[1] if len(arguments) > 1 else int
        return isinstance(value, dict) and all(
            fits(name, arguments[0]) and fits(item, inner) for name, item in value.items()
        )
    if annotation is int:
        return type(value) is int and 0 <= value < 1 << 63
    if annotation is float:
        return type(value) in (int, float) and abs(value) < float("inf")
    return type(value) is annotation


def shown(value: object, limit: int = 80) -> str:
    """Return any value out of a file as it can be put into a message: short, on one line, text without quotes.

    No more of a large value is looked at than is shown.
    """
    if not isinstance(value, str):
        return quoted(value, limit)
    text = printable(value[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """Return a text with everything escaped that is no sign on a line: controls, breaks, half characters."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def quoted(value: object, limit: int = 80) -> str:
    """Return the same with text in quotes."""
    short = _Short()
    short.maxstring = limit + 1
    text = " ".join(short.repr(value).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        """Return the beginning of a text."""
        return repr(x[: self.maxstring])

    def repr_int(self, x: int, level: int) -> str:
        """Return a number; one of thousands of digits has no other words in Python."""
        return repr(x) if x.bit_length() < 200 else f"a number of {x.bit_length()} bits"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is given twice")
        found[name] = value
    return found


def _not_finite(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{shown(digits)} is too large a number")
    return number
