"""How a run ended: `exit_status.json` in its save directory, and the record a worker leaves for its launcher.

A requeue script reads the exit code and this file, never a log:

    {"exit_code": 2, "reason": "bad configuration", "message": "error: ...", "iteration": null, "time": "..."}
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_let.errors import (
    EXIT_BAD_CONFIGURATION,
    EXIT_BAD_NUMBERS,
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_PREEMPTED,
)
from megatron_let.regular_files import read_text

EXIT_STATUS_FILE = "exit_status.json"
# The launcher's directory for what its workers tell it; set for them, so its presence means "started by us".
LAUNCH_DIRECTORY_VARIABLE = "MEGATRON_LET_LAUNCH_DIRECTORY"
_SAVE_DIRECTORY_NOTE = "save_directory"


@dataclass(frozen=True)
class FailureRecord:
    """What one rank says about its own end."""

    exit_code: int
    message: str  # the one line a person reads
    traceback: str | None  # None when the line says it all: the user's mistake, an interrupt
    time: float  # seconds since the epoch
    rank: int
    pids: tuple[int, int]  # its own and its parent's: one of them is the program that the launcher started
    save_directory: str | None  # where the run saves, or would have saved
    iteration: int | None


def reason_of(exit_code: int) -> str:
    """Name what an exit code means (128 + n: signal n)."""
    reasons = {
        EXIT_DONE: "done",
        EXIT_CRASH: "crash",
        EXIT_BAD_CONFIGURATION: "bad configuration",
        EXIT_PREEMPTED: "preempted",
        EXIT_BAD_NUMBERS: "bad numbers",
    }
    if exit_code in reasons:
        return reasons[exit_code]
    return "signal" if exit_code > 128 else "other"


def signal_name(number: int) -> str:
    """Return a signal's name, or its number where the system has no name for it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def write_exit_status(
    directory: str | os.PathLike[str], code: int, reason: str, message: str, iteration: int | None
) -> bool:
    """Write `exit_status.json` into an existing directory by a temporary name; return whether it is there.

    Never raises and never makes the directory: it tells how a run ended and must not hide why.
    """
    status = {
        "exit_code": code,
        "reason": reason,
        "message": message,
        "iteration": iteration,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return _write_atomically(Path(directory, EXIT_STATUS_FILE), json.dumps(status, indent=1) + "\n")


def clear_exit_status(directory: str | os.PathLike[str]) -> None:
    """Remove the status of an earlier run, so that a run that is killed leaves none instead of a wrong one."""
    try:
        Path(directory, EXIT_STATUS_FILE).unlink(missing_ok=True)
    except OSError:
        return  # an unwritable save directory has its own error, with its own line


def has_exit_status_since(directory: str | os.PathLike[str], time: float) -> bool:
    """Return whether a status was written at or after `time` (seconds since the epoch)."""
    try:
        return Path(directory, EXIT_STATUS_FILE).stat().st_mtime >= time
    except OSError:
        return False


def leave_record(record: FailureRecord) -> bool:
    """Leave a rank's record for the launcher that started it; return False when there is none to read it."""
    directory = os.environ.get(LAUNCH_DIRECTORY_VARIABLE)
    if directory is None:
        return False
    return _write_atomically(Path(directory, f"rank_{record.rank}.json"), json.dumps(asdict(record)))


def read_records(directory: str | os.PathLike[str]) -> dict[int, FailureRecord]:
    """Return the records left in a launcher's directory by rank; a torn one counts as none."""
    records = {}
    for path in Path(directory).glob("rank_*.json"):
        try:
            fields = json.loads(read_text(path))
            fields["pids"] = tuple(fields["pids"])
            record = FailureRecord(**fields)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        records[record.rank] = record
    return records


def announce_save_directory(save_directory: str | os.PathLike[str]) -> None:
    """Tell the launcher where the status belongs, for the case that a worker is killed and cannot say so."""
    directory = os.environ.get(LAUNCH_DIRECTORY_VARIABLE)
    if directory is not None:
        _write_atomically(Path(directory, _SAVE_DIRECTORY_NOTE), str(Path(save_directory).absolute()))


def announced_save_directory(directory: str | os.PathLike[str]) -> str | None:
    """Return what a worker announced to this launcher's directory."""
    try:
        return read_text(Path(directory, _SAVE_DIRECTORY_NOTE))
    except OSError:
        return None


def _write_atomically(path: Path, text: str) -> bool:
    """Write a small file so that it is there whole or not at all; return whether it is."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            return False
    except OSError:
        return False
    return True
