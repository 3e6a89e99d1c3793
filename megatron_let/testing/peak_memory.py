"""Run a command and say how much memory the largest of its processes took.

    python -m megatron_let.testing.peak_memory COMMAND ARGUMENT ...

prints `peak bytes N` last and ends with the command's status. A program of its own, and a small one: what the system tells
of a child's peak includes its parent's size at the time of the fork, which hides what is smaller than a test suite.
"""

from __future__ import annotations

import resource
import subprocess
import sys

LABEL = "peak bytes"


def measured(command: list[str]) -> list[str]:
    """Return the command that runs `command` and prints its peak."""
    return [sys.executable, "-m", "megatron_let.testing.peak_memory", *command]


def peak_of(output: str) -> int:
    """Return the peak in bytes that stands in the last line of the output."""
    return int(output.splitlines()[-1].removeprefix(LABEL))


def main() -> int:
    """Run the command."""
    status = subprocess.run(sys.argv[1:]).returncode
    sys.stdout.flush()
    print(f"{LABEL} {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
