"""What the tests would inherit from whoever starts them, and what one test would leave to the next.

Both are made the same for every test: the first once, before torch is imported, the second after each test.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from unittest.mock import patch

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}
# Set by a launcher, a scheduler, a shell for its own window, or a user of the recipes.
_FOREIGN_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "TORCHELASTIC_", "MEGATRON_LET_", "PYTHON")
_FOREIGN = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("CUDA_DEVICE_MAX_CONNECTIONS", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "BASH_ENV", "ENV"),
        *("DATA", "TEACHER", "SAVE", "LET", "CACHE", "DRY_RUN", "PLAN", "ENTRY", "LAUNCHER", "NNODES"),
        *("NODE_RANK", "GPUS_PER_NODE", "CDPATH"),
    )
)
_SHARED = ("PATH", "HOME", "TMPDIR")
_KEPT_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}  # ignored by the interpreter, given back to what it starts
_SIGNALS = frozenset(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, *_KEPT_BY_PYTHON}


def set_surroundings() -> None:
    """Begin as from a terminal on a bare machine: signals, their mask, the environment and the mask of file modes.

    `nohup` hands on an ignored SIGHUP, a shell's background an ignored SIGINT. Handlers in their place still shield the
    tests, and the programs that these start find the signals' default actions.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in _SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, _shield)
    if signal.getsignal(signal.SIGINT) is _shield:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGCHLD) is _shield:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for name in filter(_is_foreign, list(os.environ)):
        del os.environ[name]
    os.environ.update(OFFLINE)
    os.umask(0o022)


def _is_foreign(name: str) -> bool:
    """Return whether an environment variable would change what the tests see."""
    return name in _FOREIGN or name.startswith(_FOREIGN_PREFIXES)


def _shield(number: int, frame: FrameType | None) -> None:
    """Take a signal that is to be ignored."""


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """End what was started in the block, close it and put back what was changed; then say what that was.

    Raises:
        AssertionError: something was left.
    """
    started: list[subprocess.Popen] = []
    start = subprocess.Popen.__init__

    def noted(program: subprocess.Popen, *words: object, **settings: object) -> None:
        start(program, *words, **settings)  # type: ignore[call-overload]
        started.append(program)

    before, descriptors = _state(), _descriptors()
    with patch.object(subprocess.Popen, "__init__", noted):
        yield
    left = [what for program in started if (what := _ended(program))]
    left += _put_back(before)
    if _descriptors() - descriptors:
        gc.collect()  # garbage that holds a file says so here, not in a later test
    assert not left, f"the test leaves behind: {', '.join(left)}"


def forget_failure() -> None:
    """Drop what the frames of a failed test hold, without a word: its failure has been told."""
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        with suppress(AttributeError):
            delattr(sys, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def _ended(program: subprocess.Popen) -> str | None:
    """End a program that runs and close its pipes; return what there was to do."""
    command = program.args if isinstance(program.args, str) else " ".join(map(str, program.args))  # type: ignore[arg-type]
    what = None
    for pipe in (program.stdin, program.stdout, program.stderr):
        if pipe is not None and not pipe.closed:
            what = f"an open pipe of `{command[:200]}`"
            with suppress(OSError):
                pipe.close()
    if program.poll() is None:
        what = f"the running `{command[:200]}`"
        program.kill()
        program.wait()
    return what


def _state() -> dict[str, object]:
    """Return what is one for the whole program."""
    # Others are left alone: libraries keep notes of their own in the environment.
    environment = {
        name: value for name, value in os.environ.items() if name in (*OFFLINE, *_SHARED) or _is_foreign(name)
    }
    actions = {number.name: signal.getsignal(number) for number in _SIGNALS}
    return {"cwd": os.getcwd(), "environment": environment, **actions}


def _put_back(before: dict[str, object]) -> list[str]:
    """Put back what differs from `before`; return it in words."""
    left = []
    for name, now in _state().items():
        then = before[name]
        if now == then:
            continue
        if name == "cwd":
            os.chdir(str(then))
            left.append(f"another working directory ({now})")
        elif isinstance(then, dict) and isinstance(now, dict):
            changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
            for key in changed:
                os.environ.pop(key, None)
            os.environ.update({key: then[key] for key in changed if key in then})
            left.append(f"changed variables ({' '.join(changed)})")
        else:
            signal.signal(signal.Signals[name], then)  # type: ignore[arg-type]
            left.append(f"another action of {name}")
    return left


def _descriptors() -> set[str]:
    """Return the open files of this program, none where the system does not tell (Linux does)."""
    place = Path("/proc/self/fd")
    return set(os.listdir(place)) if place.is_dir() else set()
