"""What the fuzz tests share: honest bytes and values, spoilt; and what may come of them.

A run takes them or refuses them in one line that names the file, within bounds of memory and time. By hand, with other
examples each time and 50 times as many of them: FUZZ_FACTOR=50 pytest tests/fuzz
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_let.errors import LetError, ProblemsError

_FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
_ROOM_BYTES = 1 << 30
_HUNG_SECONDS = 120
"""Of waiting, in loops that no signal interrupts: the whole test program ends with a traceback."""
_LONGEST_SECONDS = 10.0
"""Of this process's time for one example."""

Edits = list[tuple[str, float, int]]
EDITS: st.SearchStrategy[Edits] = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "number", "cut"]),
        st.floats(0, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)
NUMBERS = (0, 1, -1, 1 << 31, -(1 << 31), (1 << 60) + 1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)

_DEEP, _LONG, _NESTED = "<deep>", "<long>", "<nested>"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 1.5, 1 << 31, -(1 << 63), 1 << 63, 10**18, 10**30, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "x" * 300,
        "ü",
        "../../x",
        "/etc/passwd",
        "a/b",
        "..",
        "a\0b",
        "\ud800",
        "line\nline",
        "1e999",
    ),
    *([], {}, [1], ["x"], {"x": 1}, [[]], [[1, 2, 3, 4]], _DEEP, _LONG, _NESTED),
)
Changes = list[tuple[str, list[float], Any]]
CHANGES: st.SearchStrategy[Changes] = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "replace", "delete", "add", "rename"]),
        st.lists(st.floats(0, 0.999), min_size=1, max_size=6),
        st.sampled_from(ODD),
    ),
    min_size=1,
    max_size=3,
)


def fuzz(max_examples: int) -> settings:
    """Return the settings of a fuzz test: the same examples each time, but for runs by hand."""
    return settings(
        max_examples=max_examples * _FACTOR,
        derandomize=_FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def spoil(data: bytes, edits: Edits) -> bytes:
    """Change bytes at places given as fractions of the length."""
    changed = bytearray(data)
    for kind, where, value in edits:
        place = min(int(where * len(changed)), max(0, len(changed) - 1))
        if kind == "flip" and changed:
            changed[place] ^= value or 1
        elif kind == "set" and changed:
            changed[place] = value
        elif kind == "insert":
            changed.insert(place, value)
        elif kind == "delete":
            del changed[place : place + 1 + value % 8]
        elif kind == "repeat":
            changed[place:place] = changed[place : place + value]
        elif kind == "number":
            number = NUMBERS[value % len(NUMBERS)]
            changed[place : place + 8] = (number & ((1 << 64) - 1)).to_bytes(8, "little")
        elif kind == "cut" and value < 32:
            del changed[place:]
    return bytes(changed)


def change(value: Any, changes: Changes) -> Any:
    """Return plain values with some of them, at places given by fractions on each level, replaced or removed."""
    root = [copy.deepcopy(value)]
    for kind, fractions, odd in changes:
        container: Any = root
        key: Any = 0
        for fraction in fractions:
            inner = container[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            names = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            container, key = inner, names[int(fraction * len(names))]
        _apply(container, key, kind, copy.deepcopy(odd))
        if not root:
            root = [None]
    return root[0]


def _apply(container: Any, key: Any, kind: str, odd: Any) -> None:
    if kind == "delete":
        del container[key]
    elif kind == "add" and isinstance(container, list):
        container.insert(key, odd)
    elif kind == "add":
        container["more"] = odd
    elif kind == "rename" and isinstance(container, dict):
        container[str(odd)] = container.pop(key)
    else:
        container[key] = odd


def to_json(value: Any) -> bytes:
    """Return JSON with what Python writes beyond it (NaN), half characters, and what only a text can hold."""
    text = json.dumps(value)
    for mark, meant in ((_DEEP, "[" * 100_000), (_LONG, "9" * 5000), (_NESTED, "[" * 300 + "]" * 300)):
        text = text.replace(f'"{mark}"', meant)
    return text.encode()


def with_file(directory: Path, name: str, content: bytes, use: Callable[[Path], str | None]) -> str | None:
    """Use a directory while one of its files has another content."""
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(content)
    try:
        return use(directory)
    finally:
        (directory / name).write_bytes(whole)


def said(action: Callable[[], object], place: Path | str) -> str | None:
    """Do something with spoilt input; return the line with which it was refused, None when it was not.

    The line must be readable and name `place`; any other exception, hang or hunger is the test's failure.
    """
    began = time.process_time()
    try:
        with _bounded():
            action()
    except LetError as error:
        message = str(error)
        for line in message.split(ProblemsError.SEPARATOR):  # one for each mistake
            assert line.isprintable(), ascii(line)
            assert len(line) < 1000
        assert str(place) in message
        assert not re.search(r"MemoryError|not enough memory|allocate", message), message
        return message
    finally:
        assert time.process_time() - began < _LONGEST_SECONDS
    return None


@contextmanager
def _bounded() -> Iterator[None]:
    """Let this process take no more than _ROOM_BYTES of addresses, and end it where it hangs."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ROOM_BYTES
    faulthandler.dump_traceback_later(_HUNG_SECONDS, exit=True)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
