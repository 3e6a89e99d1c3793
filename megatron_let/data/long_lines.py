"""Long JSON lines and long texts: read within a small multiple of their size, whatever is in them.

A parser would make of a line of 128 MiB a text of 512 MiB when it holds a single emoji (Python stores all characters of a
`str` in the width of the widest), and of 30 MB of `{},{},` a gigabyte of objects. So the strings of a long line are found
first; what stands outside them tells how many values there are, and long strings are taken out and decoded in pieces.
What a line means, and whether it is valid, stays as the parser has it.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import orjson

LONG_BYTES = 1 << 20
"""A line, a string in it or a plain text above this is long."""
MAX_VALUES = 4_000_000
"""Values in a long line, counted by what separates them: some 400 MB of objects."""
_SEPARATORS = (b"{", b"[", b",", b":")
_QUOTE = re.compile(rb'"')
# A stretch of a string's inside. Bounded, since the engine's memory grows with every turn of the group.
_INSIDE_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,1000}', re.DOTALL)
_IS_KEY = re.compile(rb"[ \t\r\n]*:")
# Where a JSON string may be cut: before an escape, unless that is the second half of a surrogate pair; else where
# no escape is near; never inside a character.
_STRING_CUT = re.compile(
    rb"(?<!\\)(?=\\(?!u[dD][c-fC-F]))|(?<=[^\\]{12})(?=[^\\\x80-\xbf])",
    re.DOTALL,
)
_TEXT_CUT = re.compile(rb"(?=[^\x80-\xbf])", re.DOTALL)


class TooComplex(ValueError):
    """A line of so many values, or so long a key, that it would take gigabytes."""


class LongText:
    """A text as pieces of UTF-8, of which slices are made into `str`."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._pieces: list[bytes] = []
        self.has_lone_surrogate = False
        lengths: list[int] = []
        for text in texts:
            lengths.append(len(text))
            try:
                self._pieces.append(text.encode("utf-8"))
            except UnicodeEncodeError:
                self._pieces.append(text.encode("utf-8", "surrogatepass"))
                self.has_lone_surrogate = True
        self._ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, part: slice) -> str:
        start, stop, _ = part.indices(len(self))
        index = bisect_right(self._ends, start)
        found: list[str] = []
        while start < stop:
            first = self._ends[index - 1] if index else 0
            piece = self._pieces[index].decode("utf-8", "surrogatepass")
            found.append(piece[start - first : stop - first])
            start, index = self._ends[index], index + 1
        return "".join(found)

    def __str__(self) -> str:
        return self[:]

    def utf8_size(self) -> int:
        """Return its size in UTF-8 bytes."""
        return sum(map(len, self._pieces))


Text = str | LongText


def without_long_strings(
    content: memoryview, replace_invalid_utf8: bool
) -> tuple[memoryview | bytes, dict[str, LongText]]:
    """Return the line with a name in the place of each long string, and the strings by name.

    Raises:
        TooComplex: parsing it would take too much memory.
        ValueError: it is not valid JSON or UTF-8.
    """
    parts: list[memoryview | bytes] = []
    strings: dict[str, LongText] = {}
    prefix = secrets.token_hex(16)  # that no line holds by chance or on purpose
    num_values = position = copied = 0
    while opening := _QUOTE.search(content, position):
        num_values += _num_separators(content[position : opening.start()])
        if num_values > MAX_VALUES:
            raise TooComplex(f"more than {MAX_VALUES:,} values")
        start = opening.end()
        position = _end_of_string(content, start) + 1
        if position - start > LONG_BYTES:
            if _IS_KEY.match(content, position):
                raise TooComplex("a key of more than a mebibyte")
            name = f"{prefix}{len(strings)}"
            strings[name] = LongText(_string_pieces(content[start : position - 1], replace_invalid_utf8))
            parts += [content[copied:start], name.encode()]
            copied = position - 1
    num_values += _num_separators(content[position:])
    if num_values > MAX_VALUES:
        raise TooComplex(f"more than {MAX_VALUES:,} values")
    return (b"".join([*parts, content[copied:]]) if strings else content), strings


def put_back(value: Any, strings: dict[str, LongText]) -> Any:
    """Return a parsed value with the long strings in it, without recursion: it may be nested deeply."""
    if not strings:
        return value
    holder = [value]
    left: list[Any] = [holder]
    while left:
        container = left.pop()
        entries = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in entries:
            if isinstance(item, str):
                if item in strings:
                    container[key] = strings[item]
            elif isinstance(item, (dict, list)):
                left.append(item)
    return holder[0]


def long_text(content: memoryview, errors: str) -> LongText:
    """Return a plain text. Raises UnicodeDecodeError where it is not UTF-8 and `errors` is strict."""
    return LongText(str(piece, "utf-8", errors) for piece in _cut(content, _TEXT_CUT))


def _end_of_string(content: memoryview, start: int) -> int:
    """Return where the quote is that ends the string begun before `start`. Raises ValueError where there is none."""
    while inside := _INSIDE_STRING.match(content, start):
        end = inside.end()
        if end < len(content) and content[end : end + 1] == b'"':
            return end
        if end == start:
            break
        start = end
    raise ValueError("a string without end")


def _num_separators(content: memoryview) -> int:
    if len(content) <= 2:  # between two strings, as a rule, with or without a space
        return 1
    outside = bytes(content)
    return sum(map(outside.count, _SEPARATORS))


def _string_pieces(content: memoryview, replace_invalid_utf8: bool) -> Iterable[str]:
    for piece in _cut(content, _STRING_CUT):
        literal = b'"' + piece + b'"'
        try:
            yield orjson.loads(literal)
        except orjson.JSONDecodeError:  # the standard library takes more: half surrogate pairs
            yield json.loads(literal.decode("utf-8", "replace" if replace_invalid_utf8 else "strict"))


def _cut(content: memoryview, places: re.Pattern[bytes]) -> Iterable[memoryview]:
    start = 0
    while len(content) - start > LONG_BYTES:
        place = places.search(content, start + LONG_BYTES)
        if not place:
            break
        yield content[start : place.start()]
        start = place.start()
    yield content[start:]
