"""Is a program still there, and how long is waited for one?"""

from __future__ import annotations

from pathlib import Path

HANG_SECONDS = 600.0
"""What has not ended by then never will. On a crowded machine an import of torch takes a minute; a test that passes does not
wait, so no test states less."""


def is_running(pid: int) -> bool:
    """Return whether a program with this id runs; one that has ended and waits to be noticed does not. Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
