"""A real Slurm on this machine for the tests, and why there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv", "python3")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
START_SECONDS = 60.0


def missing() -> str | None:
    """Return why no Slurm can be started here, None when one can."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: Slurm is not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "only root can start slurmd"


class Cluster:
    """A running Slurm of one node; it ends with its standard input, and so with the program that started it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ready = directory / "ready"
        script = ROOT / "scripts" / "slurm" / "one_node_cluster.sh"
        said = directory / "said"
        with said.open("w") as stderr:
            self._program = subprocess.Popen(
                ["bash", str(script), str(directory), "bash", "-c", f"touch '{ready}'; cat"],
                stdin=subprocess.PIPE,
                stderr=stderr,
            )
        try:
            wait_for(lambda: ready.exists() or self._program.poll() is not None, START_SECONDS)
        except BaseException:
            self.stop()
            raise
        if not ready.exists():
            raise AssertionError(f"no Slurm: {said.read_text()}")

    def run(self, *command: str, **variables: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf")}
        environment.update(PYTHONPATH=str(ROOT), PYTHON=sys.executable, **variables)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str, **variables: str) -> str:
        """Submit a job and return its number."""
        return self.run("sbatch", "--parsable", *words, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job, by Slurm's names."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def is_over(self, number: str) -> bool:
        """Return whether a job has ended for good; a job array when all its members have."""
        states = self.run("squeue", "--noheader", f"--job={number}", "--states=all", "--format=%T").split()
        return set(states) <= {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

    def stop(self) -> None:
        """End all jobs and the daemons."""
        assert self._program.stdin is not None
        with suppress(BrokenPipeError):
            self._program.stdin.close()
        try:
            self._program.wait(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self._program.kill()


def wait_for(is_so: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so, or fail."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)
