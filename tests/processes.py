"""Is a program still there?"""

from __future__ import annotations

from pathlib import Path


def is_running(pid: int) -> bool:
    """Return whether a program with this id runs; one that has ended and waits to be noticed does not. Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
