"""Read a pickle without running what it asks for.

A pickle is a program: it names functions and has them called. Here a name outside a short list is refused, and one on
the list stands for an inert record of what the pickle wanted to build; no class or function of a library is ever
reached. Memory and time stay in proportion to the length of the pickle.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from megatron_let.errors import ConfigError

MAX_DEPTH = 100
"""Containers within containers; what a checkpoint holds is far flatter."""

MAX_VALUES = 10_000_000
"""Plain values in one pickle, a value counted as often as it is referred to."""

_END = object()

# What torch and Python 3.10 to 3.14 write for plain values, tuples, lists, dicts and objects, in protocols 2 to 5.
# Sets are left out, and text forms of numbers, and everything that copies or drops what lies on the stack.
_OPCODES = """
    PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2
    LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


class Refused(Exception):
    """A file is not loaded; the text says why and continues a sentence that begins with the file."""


class _Frozen(type):
    """A class whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise Refused("sets an attribute of a class")


class Record(metaclass=_Frozen):
    """What a pickle wanted to build: the arguments of the call, and the state that it gave the result."""

    __slots__ = ("args", "state")

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        """Remember the arguments; NEWOBJ calls this alone and REDUCE the class."""
        record = object.__new__(cls)
        record.args = args
        record.state = None
        record.check_args()
        return record

    def check_args(self) -> None:
        """Raise Refused for arguments that no honest pickle gives; a kind with rules overrides this."""

    def __setstate__(self, state: Any) -> None:
        if self.state is not None:
            raise Refused("gives an object its state twice")
        self.state = state


class Enumeration(Record):
    """A member of an enumeration, made from its value."""

    __slots__ = ()


class Member(Record):
    """A member of an enumeration as Python 3.11.0 to 3.11.3 write it: `getattr(its class, its name)`."""

    __slots__ = ()

    def check_args(self) -> None:
        """Refuse to stand for any other attribute of anything else."""
        kind, name = self.args if len(self.args) == 2 else (None, None)
        is_member = isinstance(kind, type) and issubclass(kind, Enumeration)
        if not (is_member and type(name) is str and re.fullmatch("[A-Z][A-Z0-9_]*", name)):
            raise Refused("asks for builtins.getattr, which could run code")

    def __setstate__(self, state: Any) -> None:
        raise Refused("changes a member of an enumeration")


GETATTR = ("builtins", "getattr")
"""The name that `Member` may stand for."""


def shown(name: str) -> str:
    """Return a name out of a file as it can be put into a message: not long, and without control characters."""
    return ascii(name[:100])[1:-1]


def record_type(name: str) -> type[Record]:
    """Make a kind of record."""
    kind: Any = _Frozen(name, (Record,), {"__slots__": ()})
    assert issubclass(kind, Record)
    return kind


# The unpickler written in Python: in the other one a hostile memo index fills the memory.
class _Reader(pickle._Unpickler):
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        data: bytes,
        names: Mapping[tuple[str, str], Any],
        storage: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._names = names
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name on the list."""
        if (module, name) not in self._names:
            raise Refused(f"asks for {shown(module)}.{shown(name)}, which could run code")
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Return what stands for a tensor's storage."""
        if self._storage is None:
            raise Refused("refers to something outside itself")
        return self._storage(pid)

    def set_item(self) -> None:
        """Put one item into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def set_items(self) -> None:
        """Put the items behind the last mark into a dict."""
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    @staticmethod
    def _put(target: Any, items: list[Any]) -> None:
        if type(target) is not dict:
            raise Refused("puts items into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of a tuple of tuples of tuples may take for ever.
            if not isinstance(key, (str, int, Record, type(None))):
                raise Refused(f"has a key of type {type(key).__name__}")
            target[key] = value

    dispatch: ClassVar[dict[int, Any]] = {
        code: action
        for name in _OPCODES.split()
        for code, action in pickle._Unpickler.dispatch.items()
        if code == getattr(pickle, name)[0]
    } | {pickle.SETITEM[0]: set_item, pickle.SETITEMS[0]: set_items}


def read_pickle(
    data: bytes, names: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any] | None = None
) -> Any:
    """Return what a pickle describes: plain values, and a record wherever it calls one of `names`.

    names: (module, name) -> a type of `Record`, or a value that takes the name's place.
    storage: what stands for a persistent id, None to allow none.

    Raises:
        Refused: it asks for another name, or is built as no honest one is.
        Exception: it is no pickle, or not a whole one; of any kind.
    """
    result = _Reader(data, names, storage).load()
    _check_extent(result)
    return result


def _check_extent(value: Any) -> None:
    """Refuse what is small only because it refers to its parts again and again, or holds itself, or is very deep."""
    measured: dict[int, int] = {}  # container -> values in it when every reference is followed
    path: dict[int, Iterator[Any]] = {}
    todo = [value]
    while todo:
        current = todo[-1]
        if not isinstance(current, (dict, list, tuple)) or id(current) in measured:
            todo.pop()
            continue
        if id(current) not in path:
            path[id(current)] = iter(_children(current))
            if len(path) > MAX_DEPTH:
                raise Refused(f"is nested more than {MAX_DEPTH} deep")
        child = next(path[id(current)], _END)
        if child is _END:
            del path[id(current)]
            measured[id(current)] = 1 + sum(measured.get(id(part), 1) for part in _children(current))
            if measured[id(current)] > MAX_VALUES:
                raise Refused(f"unfolds to more than {MAX_VALUES} values")
        elif id(child) in path:
            raise Refused("holds something that holds itself")
        else:
            todo.append(child)


def _children(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


@contextmanager
def refusals(path: Path, entry: str | None = None) -> Iterator[None]:
    """Turn what reading a file (or one entry of it) raises into a line for a person.

    Raises:
        ConfigError: the file is not safe to load, damaged, or not there.
    """
    place = str(path) if entry is None else f"{path} ({shown(entry)})"
    try:
        yield
    except Refused as refused:
        raise ConfigError(
            f"{place} {refused}; it is not loaded: megatron_let writes no such file, take the checkpoint from where it "
            "was trained"
        ) from refused
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror or error}") from error
    except ConfigError:
        raise
    except Exception as error:  # what a parser raises over spoilt bytes depends on where they are spoilt
        text = " ".join(str(error).split())[:200] or "no reason given"
        raise ConfigError(
            f"{place} cannot be read: it is damaged or not of this format ({type(error).__name__}: {text}); take another "
            "checkpoint"
        ) from error
