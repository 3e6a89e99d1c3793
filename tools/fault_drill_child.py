"""A training program that something happens to: `pretrain_let.py` with one fault at a stated iteration and place.

Started by tools/fault_drill.py in the place of pretrain_let.py. What happens, where and when stands in FAULT_DRILL as
JSON; no clock has a part in it, so that a drill can be repeated. The program itself knows nothing of drills.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.entry import end_program, run_main
from megatron_let.lifetime import LAUNCHER_PID_VARIABLE

VARIABLE = "FAULT_DRILL"
FILLER = "filler"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once."""

    action: str
    """kill, kill_launcher, terminate_launcher, terminate, terminate_twice, stop, raise, fill."""
    place: str
    """forward, optimizer, iteration_end, or a step of saving (SAVE_STEPS)."""
    iteration: int
    """Completed iterations when it happens; in saving, the iteration that is saved."""
    rank: int
    """The rank that it happens on; -1: on every one."""


SAVE_STEPS = (
    "before_copy",
    "before_data",
    "after_data",
    "before_metadata",
    "before_manifest",
    "before_rename",
    "before_tracker",
    "after_tracker",
    "in_deletion",
)
"""In the order in which a save goes through them."""


def main() -> None:
    """Arm the fault, then train."""
    if VARIABLE not in os.environ:
        raise SystemExit(f"error: {VARIABLE} is not set; tools/fault_drill.py starts this program")
    arm(Fault(**json.loads(os.environ[VARIABLE])))
    import pretrain_let

    end_program(run_main(pretrain_let.main))


def arm(fault: Fault) -> None:
    """Put the fault into the place where it is to happen."""
    if fault.rank not in (-1, int(os.environ["RANK"])):
        return
    from megatron_let.training import trainer
    from megatron_let.training.signals import StopRequest

    told = threading.Event()
    receive = StopRequest.receive

    @wraps(receive)
    def received(self: Any, number: int, now: float) -> None:
        receive(self, number, now)
        told.set()

    StopRequest.receive = received  # type: ignore[method-assign]
    reached = [0]  # the iteration that is being done, or is saved
    step = trainer.Trainer.step

    @wraps(step)
    def counted(self: Any, iterators: Any) -> None:
        reached[0] = self.state.iteration
        step(self, iterators)

    trainer.Trainer.step = counted  # type: ignore[method-assign]
    owner, name, is_before = _places()[fault.place]
    action = getattr(owner, name)
    happened = list[bool]()

    @wraps(action)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        is_due = not happened and _iteration_of(fault.place, args, reached[0]) == fault.iteration
        if is_due and is_before:
            happened.append(True)
            happen(fault, args, told)
        result = action(*args, **kwargs)
        if is_due and not is_before:
            happened.append(True)
            happen(fault, args, told)
        return result

    setattr(owner, name, faulty)


def _places() -> dict[str, tuple[Any, str, bool]]:
    """Return for each place what is called there, and whether the fault comes before the call or after it."""
    from megatron_let.mcore.checkpoint_writer import Content
    from megatron_let.training import checkpoint_files
    from megatron_let.training.forward_step import ForwardStep
    from megatron_let.training.saving import CheckpointSaver
    from megatron_let.training.trainer import Trainer

    return {
        "forward": (ForwardStep, "__call__", True),
        "optimizer": (Trainer, "_empty_unused_memory", True),
        "iteration_end": (Trainer, "_after_iteration", False),
        "before_copy": (Content, "copy", True),
        "before_data": (Content, "write", True),
        "after_data": (Content, "write", False),
        "before_metadata": (Content, "finish", True),
        "before_manifest": (checkpoint_files, "finish", True),
        "before_rename": (checkpoint_files, "_sync_directory", True),
        "before_tracker": (checkpoint_files, "write_tracker", True),
        "after_tracker": (CheckpointSaver, "_finish", False),
        "in_deletion": (shutil, "rmtree", True),
    }


def _iteration_of(place: str, args: tuple[Any, ...], reached: int) -> int | None:
    """Return the iteration that a call belongs to: the one being done, or the one whose checkpoint is written."""
    if place not in SAVE_STEPS:
        return reached
    for argument in args:
        found = getattr(argument, "iteration", argument)
        if isinstance(found, int):
            return found
        directory = Path(str(getattr(argument, "_directory", argument))).name
        digits = directory.removeprefix("iter_").split(".")[0]
        if directory.startswith("iter_") and digits.isdigit():
            return int(digits)
    return None


def happen(fault: Fault, args: tuple[Any, ...], told: threading.Event) -> None:
    """Let it happen; a signal that the run is to act on has come to this rank (`told`) before it goes on."""
    launcher = int(os.environ[LAUNCHER_PID_VARIABLE])
    signals = {
        "kill": (os.getpid(), signal.SIGKILL, 1),
        "kill_launcher": (launcher, signal.SIGKILL, 1),
        "terminate": (os.getpid(), signal.SIGTERM, 1),
        "terminate_launcher": (launcher, signal.SIGTERM, 1),
        "terminate_twice": (launcher, signal.SIGTERM, 2),
        "stop": (os.getpid(), signal.SIGSTOP, 1),
    }
    if fault.action == "raise":
        raise RuntimeError("the drill's own error")
    if fault.action == "fill":
        fill(Path(args[0]._directory).parent)
        return
    pid, number, times = signals[fault.action]
    for _ in range(times):
        os.kill(pid, number)
    if number == signal.SIGTERM and not told.wait(60):
        raise RuntimeError("the signal did not arrive")


def fill(directory: Path) -> None:
    """Fill the file system that a directory is on, to its last byte."""
    size = 1 << 20
    with (directory / FILLER).open("wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


if __name__ == "__main__":
    main()
