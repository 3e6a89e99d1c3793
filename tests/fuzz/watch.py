"""What no use of foreign input may do: touch files elsewhere, start programs, connect, or run code that came with it."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

_PLACES = tuple(
    os.path.realpath(place)
    for place in (
        str(Path(__file__).parents[2]),
        sys.prefix,
        sys.base_prefix,
        sysconfig.get_paths()["stdlib"],
        *(path for path in sys.path if path.endswith("-packages")),
        "/proc",
        "/sys",
        "/dev",
        "/usr/share",
    )
)
_LIBRARY = os.path.dirname(os.__file__)
_NEVER = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "pickle.find_class"),
)
_CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1} | {
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
}
"""Events of Python's audit -> how many of their arguments are paths."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Python's audit of one directory's uses: what else they do is stopped, and is an AssertionError afterwards.

    The hook stays for the life of the program, so this is for programs of their own. Files that C opens pass unheard.
    """

    def __init__(self, directory: Path) -> None:
        """Watch uses of `directory`."""
        self._directory = os.path.realpath(directory)
        self._reads_anything = False
        self._is_on = False
        self._heard: list[str] = []
        sys.addaudithook(self._hear)

    @contextmanager
    def use(self, *, reads_anything: bool = False) -> Iterator[None]:
        """Watch for a while; `reads_anything`: the input may name files to read, as settings do.

        Raises:
            AssertionError: something was done that must not be.
        """
        self._heard, self._reads_anything, self._is_on = [], reads_anything, True
        try:
            yield
        finally:
            self._is_on = False
            assert not self._heard, self._heard

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        self._is_on = False  # what follows is heard as well
        try:
            is_bad = self._is_bad(event, given)
        finally:
            self._is_on = True
        if is_bad:
            self._heard.append(f"{event} {given!r:.300}")
            raise PermissionError(self._heard[-1])

    def _is_bad(self, event: str, given: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = given
            if flags & _WRITING:
                return not self._is_in(path, self._directory, os.devnull)
            return not self._reads_anything and not self._is_in(path, self._directory, *_PLACES)
        if event in _CHANGES:
            return not all(self._is_in(path, self._directory) for path in given[: _CHANGES[event]])
        if event == "exec":
            name = given[0].co_filename if isinstance(given[0], CodeType) else "<?>"
            return (
                not name.startswith("<frozen") and not self._is_made(name) and not self._is_in(name, *_PLACES)
            )
        return event in _NEVER

    @staticmethod
    def _is_made(name: str) -> bool:
        """Return whether this is code out of a text, as Python's own dataclasses and type hints make some."""
        caller = sys._getframe(3).f_code.co_filename
        return (
            name.startswith("<") and os.path.dirname(caller) == _LIBRARY and not caller.endswith("pickle.py")
        )

    @staticmethod
    def _is_in(path: Any, *places: str) -> bool:
        if isinstance(path, int):
            return True
        text = os.fsdecode(path)
        if "\0" in text:  # no path: the call fails
            return True
        real = os.path.realpath(text)
        return any(real == place or real.startswith(f"{place}{os.sep}") for place in places)
