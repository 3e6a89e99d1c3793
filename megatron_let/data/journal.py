"""What an unfinished run of preprocessing keeps on disk, so that the same command goes on where it was killed.

All of it lies in PREFIX.partial/: the growing pairs, `journal.json` with how much of them is whole and how far the
input was read, and `lock`, which the run holds. The journal is replaced in one step after the pairs are on disk; what
the pairs hold beyond it is cut off when the run goes on. PREFIX.partial/ disappears when all is under its name.

A directory of that name which no run made, as `lock` tells, is somebody's: it is refused. Of an own one only files of
the names that runs write are ever deleted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.plain_json import read_json, require_fields, shown
from megatron_let.regular_files import open_regular

JOURNAL_VERSION = 1
_JOURNAL, _LOCK = "journal.json", "lock"
# In `lock`: what tells a directory that a run made from somebody's.
_MARK = "Unfinished output of megatron_let: the command that was stopped goes on from it.\n"
_OWN_NAME = re.compile(r"lock|journal\.json(\.new)?|(\d{4,}|merged)\.[a-z_.]+")
# What a network file system calls an open file that was deleted.
_GHOST = ".nfs"
_SHOWN_CHANGES = 12
# What a file system without locks answers; a run there goes on without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Journal:
    """The state of a run between two chunks, as JSON values."""

    arguments: Mapping[str, Any]
    """What decides over the bytes written: a run with others cannot go on."""
    progress: Mapping[str, Any]
    """How far each source is read, and what each pair holds."""
    installing: bool = False
    """All pairs are complete and being put under their names."""


class WorkingDirectory:
    """PREFIX.partial/, held by one run at a time. Files in it have names of the form 0000.KIND."""

    def __init__(self, prefix: str, inputs: Sequence[str] = ()) -> None:
        """Create the directory, or take over one that a run left, and lock it.

        Raises:
            ConfigError: another run holds it, no run made it, one of `inputs` lies in it, or it cannot be written.
        """
        self.path = Path(f"{prefix}.partial")
        self.refuse_inputs(inputs)
        try:
            self._lock = _hold(self.path)
        except BlockingIOError:
            raise ConfigError(
                f"another run is writing {prefix}: wait for it, or give another --output-prefix"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error

    def refuse_inputs(self, paths: Sequence[str]) -> None:
        """Raise ConfigError for a path in this directory: what lies here is deleted when the run is done."""
        here = os.path.realpath(self.path)
        for path in paths:
            if Path(os.path.realpath(path)).is_relative_to(here):
                raise ConfigError(
                    f"input {path} lies in {self.path}, where the run keeps its unfinished files: give another --output-prefix"
                )

    def read_journal(self) -> Journal | None:
        """Return the journal, None when there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            with self.taking_up():
                content = read_json(self.path / _JOURNAL)
                version = content.pop("version")
                if version != JOURNAL_VERSION:
                    raise ValueError(f"version {shown(version)}")
                require_fields(Journal, content)
                return Journal(**content)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error

    @contextmanager
    def taking_up(self) -> Iterator[None]:
        """Turn what reading the journal's values raises into a line for a person.

        Raises:
            ConfigError: they are not what a run writes.
        """
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"cannot go on from {self.path / _JOURNAL} ({type(error).__name__}: {shown(str(error), 300)}): give --restart "
            "to begin anew"
        )

    def write_journal(self, journal: Journal) -> None:
        """Replace the journal in one step."""
        content = {"version": JOURNAL_VERSION, **vars(journal)}
        new = self.path / f"{_JOURNAL}.new"
        write_synced(new, json.dumps(content))
        new.replace(self.path / _JOURNAL)

    @property
    def has_journal(self) -> bool:
        """Return whether a stopped run can be gone on with."""
        return (self.path / _JOURNAL).exists()

    def clear(self) -> None:
        """Delete what runs write here but the lock, the journal first: without it nothing that is left counts."""
        (self.path / _JOURNAL).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name != _LOCK and _OWN_NAME.fullmatch(path.name):
                path.unlink()

    def remove(self) -> None:
        """Delete the directory, the lock last, and hold it no longer. With somebody's files in it, it stays."""
        if self._lock.closed:
            return
        self.clear()
        if others := sorted(_names_in(self.path) - {_LOCK}):
            LOGGER.warning("%s stays: %s in it is not of this program", self.path, others[0])
        else:
            (self.path / _LOCK).unlink()
            with suppress(OSError):  # a mount, a link, or a file system that keeps open files
                self.path.rmdir()
        self._lock.close()

    def __enter__(self) -> WorkingDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the directory, and delete it when it holds nothing to go on from."""
        if not self.has_journal:
            with suppress(OSError):  # what happened before is what is to be told
                self.remove()
        self._lock.close()


def is_working_directory(path: str) -> bool:
    """Return whether a run of this program made the directory for its unfinished files."""
    lock = Path(path, _LOCK)
    return lock.is_file() and _has_mark(lock)


def write_synced(path: Path, text: str) -> None:
    """Write a text file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def changed_arguments(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return in words what differs between this run's arguments and those of the run to go on with."""
    names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    return "; ".join(
        f"{shown(name)} was {shown(str(theirs.get(name)))}, is {shown(str(ours.get(name)))}"
        for name in names[:_SHOWN_CHANGES]
    )


def _hold(directory: Path) -> TextIO:
    """Create and lock the directory's lock file. A dead process holds no lock."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            _require_own(directory)
            lock = (directory / _LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue  # the run that held it has just removed it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                lock.close()
                raise
        if _is_same_file(lock, directory / _LOCK):
            if not os.fstat(lock.fileno()).st_size:
                lock.write(_MARK)
                lock.flush()
            return lock
        lock.close()


def _require_own(directory: Path) -> None:
    """Raise ConfigError for a directory with content that no run wrote. One killed at its start leaves an empty lock."""
    names = _names_in(directory)
    if not names or (_LOCK in names and _has_mark(directory / _LOCK)):
        return
    others = sorted(name for name in names if not _OWN_NAME.fullmatch(name))
    if others or _LOCK not in names or (directory / _LOCK).stat().st_size:
        example = min(others or names)
        raise ConfigError(
            f"{directory} is not of this program, which keeps unfinished files under that name ({example} lies there): "
            "nothing was touched; give another --output-prefix or move it away"
        )


def _has_mark(path: Path) -> bool:
    with open_regular(path) as stream:
        return stream.read(len(_MARK) + 1) == _MARK.encode()


def _names_in(directory: Path) -> set[str]:
    return {name for name in os.listdir(directory) if not name.startswith(_GHOST)}


def _is_same_file(stream: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
