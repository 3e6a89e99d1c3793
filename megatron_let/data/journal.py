"""What an unfinished run of preprocessing keeps on disk, so that the same command goes on where it was killed.

All of it lies in PREFIX.partial/: the growing pairs, `journal.json` with how much of them is whole and how far the
input was read, and `lock`, which the run holds. The journal is replaced in one step after the pairs are on disk; what
the pairs hold beyond it is cut off when the run goes on. PREFIX.partial/ disappears when all is under its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megatron_let.errors import ConfigError
from megatron_let.plain_json import read_json, require_fields, shown

JOURNAL_VERSION = 1
_JOURNAL, _LOCK = "journal.json", "lock"
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
    """PREFIX.partial/, held by one run at a time."""

    def __init__(self, prefix: str) -> None:
        """Create the directory and lock it.

        Raises:
            ConfigError: another run holds it, or it cannot be written.
        """
        self.path = Path(f"{prefix}.partial")
        try:
            self._lock = _hold(self.path)
        except BlockingIOError:
            raise ConfigError(
                f"another run is writing {prefix}: wait for it, or give another --output-prefix"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error

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
        """Delete everything but the lock, the journal first: without it nothing that is left counts."""
        (self.path / _JOURNAL).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def remove(self) -> None:
        """Delete the directory, the lock last, and hold it no longer."""
        if not self._lock.closed:
            self.clear()
            (self.path / _LOCK).unlink()
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
            lock = (directory / _LOCK).open("w")
        except FileNotFoundError:
            continue  # the run that held it has just removed it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                lock.close()
                raise
        if _is_same_file(lock, directory / _LOCK):
            return lock
        lock.close()


def _is_same_file(stream: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
