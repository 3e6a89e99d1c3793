"""What tools/fault_drill.py does to a run: every kind of fault, and a seeded choice of drills among them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fault_drill_child import SAVE_STEPS, Fault

from megatron_let.errors import EXIT_CRASH, EXIT_PREEMPTED
from megatron_let.training import checkpoint_files as files

TRAIN_ITERS, SAVE_INTERVAL, STOP_ITERS = 16, 4, 8
KILLED = 128 + 9

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {"--use-distributed-optimizer": None, "--overlap-grad-reduce": None}),
    "pp2": (2, {"--pipeline-model-parallel-size": 2}),
    "tp2": (2, {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}),
}
"""Name -> ranks and flags."""


@dataclass(frozen=True)
class Place:
    """Where a drill takes place."""

    save: Path
    teacher: Path
    data: Path
    """Prefix of the training data."""


Damage = Callable[[Place, random.Random], str]


@dataclass(frozen=True)
class Drill:
    """One fault and what has to follow from it."""

    kind: str
    layout: str
    is_async: bool
    ends: tuple[int, ...]
    """Codes that the first run may end with."""
    fault: Fault | None = None
    """What happens while it runs; else it ends by --exit-interval."""
    exit_interval: int | None = None
    damage: Damage | None = None
    """What is done to its files after its end; says what in words."""
    refused: str | None = None
    """The damage is repaired only after a start has been refused with these words in its line."""
    flags: dict[str, Any] = field(default_factory=dict)
    on_tmpfs: bool = False
    max_lost: int = SAVE_INTERVAL
    """Iterations that may have to be done again."""
    says: str | None = None
    """Words that the first run's last lines must hold."""

    @property
    def name(self) -> str:
        """Return kind, place and layout in a few words."""
        where = (
            "" if self.fault is None else f" {self.fault.place} {self.fault.iteration} rank {self.fault.rank}"
        )
        return f"{self.kind}{where} [{self.layout}{', async' if self.is_async else ''}]"


def plan(count: int, seed: int, *, can_mount: bool) -> list[Drill]:
    """Return `count` drills: every kind in turn, each time at another place, iteration, rank and layout."""
    choose = random.Random(seed)
    kinds = [kind for kind in _KINDS if can_mount or kind not in (_full_disk, _read_only)]
    # Each kind once, then as often as its weight says, spread evenly; the one that takes minutes in the middle.
    turns = sorted(
        (0.5 if kind is _hang else turn / _KINDS[kind], index, kind)
        for index, kind in enumerate(kinds)
        for turn in range(_KINDS[kind])
    )
    return [turns[number % len(turns)][2](choose) for number in range(count)]


def _somewhere(choose: random.Random) -> tuple[str, int]:
    layout = choose.choice(list(LAYOUTS))
    return layout, choose.randrange(LAYOUTS[layout][0])


def _unsaved(is_async: bool) -> int:
    """Return the iterations that may be in no whole checkpoint: in the background a save may last until the next."""
    return SAVE_INTERVAL * (2 if is_async else 1)


def _during(
    kind: str,
    action: str,
    choose: random.Random,
    *,
    ends: int = KILLED,
    places: Sequence[str] = ("forward", "optimizer", "iteration_end"),
    rank: int | None = None,
    **more: Any,
) -> Drill:
    """Return a drill in which something happens in the middle of an iteration, to a chosen rank unless one is given."""
    layout, chosen = _somewhere(choose)
    is_async = choose.random() < 0.5
    unsaved = _unsaved(is_async)
    moment = choose.randrange(unsaved + 1, TRAIN_ITERS - 1)
    fault = Fault(action, choose.choice(places), moment, chosen if rank is None else rank)
    return Drill(kind, layout, is_async, (ends,), fault, **{"max_lost": unsaved, **more})


def _kill(choose: random.Random) -> Drill:
    drill = _during("kill one rank", "kill", choose)
    assert drill.fault is not None
    return replace(drill, says=f"rank {drill.fault.rank} ")


def _kill_all(choose: random.Random) -> Drill:
    return _during("kill all ranks", "kill", choose, places=["forward"], rank=-1)


def _kill_launcher(choose: random.Random) -> Drill:
    return _during("kill the launcher", "kill_launcher", choose, places=["forward"])


def _kill_in_save(choose: random.Random) -> Drill:
    layout, rank = _somewhere(choose)
    step = choose.choice(SAVE_STEPS)
    if step not in ("before_copy", "before_data", "after_data"):
        rank = 0  # which alone does the rest
    is_deletion = step == "in_deletion"
    iteration = SAVE_INTERVAL if is_deletion else choose.choice([8, 12])
    is_async = choose.random() < 0.5
    return Drill(
        "kill in a save",
        layout,
        is_async,
        (KILLED,),
        Fault("kill", step, iteration, rank),
        flags={"--save-keep-last": 2} if is_deletion else {},
        max_lost=_unsaved(is_async),
    )


def _terminate(choose: random.Random) -> Drill:
    action = choose.choice(["terminate", "terminate_launcher", "terminate_twice"])
    flags = {"--exit-signal-handler": None}
    return _during("SIGTERM", action, choose, ends=EXIT_PREEMPTED, flags=flags, max_lost=0)


def _error(choose: random.Random) -> Drill:
    words = "the drill's own error"
    return _during(
        "error on one rank", "raise", choose, ends=EXIT_CRASH, places=["forward", "optimizer"], says=words
    )


def _full_disk(choose: random.Random) -> Drill:
    layout, _ = _somewhere(choose)
    is_async = choose.random() < 0.5
    return Drill(
        "full disk",
        layout,
        is_async,
        (EXIT_CRASH,),
        Fault("fill", "before_data", choose.choice([8, 12]), 0),
        damage=_empty_disk,
        on_tmpfs=True,
        max_lost=_unsaved(is_async),
        says="No space left on device",
    )


def _empty_disk(place: Place, choose: random.Random) -> str:
    (place.save / "filler").unlink()
    return "the disk emptied"


def _stopped(kind: str, damage: Damage, choose: random.Random, **more: Any) -> Drill:
    """Return a drill whose first run stops at a checkpoint, whereupon something happens to its files."""
    layout, _ = _somewhere(choose)
    at = choose.choice([8, 12])
    return Drill(
        kind, layout, choose.random() < 0.5, (EXIT_PREEMPTED,), exit_interval=at, damage=damage, **more
    )


def _newest(place: Place) -> Path:
    return files.newest_iteration_directory(place.save)


def _cut(choose: random.Random) -> Drill:
    def damage(place: Place, choose: random.Random) -> str:
        path = choose.choice(sorted(_newest(place).glob("*.distcp")))
        left = int(path.stat().st_size * choose.choice([0, 0.5, 0.99]))
        with path.open("r+b") as file:
            file.truncate(left)
        return f"{path.name} cut to {left} bytes"

    return _stopped("cut shard", damage, choose)


def _flip(choose: random.Random) -> Drill:
    def damage(place: Place, choose: random.Random) -> str:
        path = choose.choice(sorted(path for path in _newest(place).iterdir() if path.name != files.MANIFEST))
        position, bit = choose.randrange(path.stat().st_size), 1 << choose.randrange(8)
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ bit]))
        return f"bit {bit} of byte {position} of {path.name} flipped"

    return _stopped("flipped bit", damage, choose)


def _missing(choose: random.Random) -> Drill:
    def damage(place: Place, choose: random.Random) -> str:
        path = choose.choice(sorted(_newest(place).iterdir()))
        path.unlink()
        return f"{path.name} deleted"

    return _stopped("missing file", damage, choose)


def _bad_tracker(choose: random.Random) -> Drill:
    def damage(place: Place, choose: random.Random) -> str:
        text = choose.choice(["", "abc", "-5", "99999999", "\0\1\2"])
        (place.save / files.TRACKER).write_text(text)
        return f"tracker holds {text!r}"

    return _stopped("bad tracker", damage, choose, max_lost=0)


def _no_teacher_before(choose: random.Random) -> Drill:
    return _no_teacher(choose, is_before=True)


def _no_teacher_after(choose: random.Random) -> Drill:
    return _no_teacher(choose, is_before=False)


def _no_teacher(choose: random.Random, *, is_before: bool) -> Drill:
    def damage(place: Place, choose: random.Random) -> str:
        place.teacher.rename(place.teacher.with_name("gone"))
        return "teacher removed"

    layout, _ = _somewhere(choose)
    return Drill(
        "no teacher before S_stop" if is_before else "no teacher after S_stop",
        layout,
        False,
        (EXIT_PREEMPTED,),
        exit_interval=STOP_ITERS - SAVE_INTERVAL if is_before else STOP_ITERS,
        damage=damage,
        refused="--let-teacher-load" if is_before else None,
        max_lost=0,
    )


def _cut_data(choose: random.Random) -> Drill:
    def damage(place: Place, choose: random.Random) -> str:
        path = place.data.with_suffix(choose.choice([".bin", ".idx"]))
        shutil.copy(path, path.with_suffix(f"{path.suffix}.kept"))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        return f"{path.name} cut in half"

    return _stopped("cut data file", damage, choose, refused="tokens", max_lost=0)


def _read_only(choose: random.Random) -> Drill:
    def damage(place: Place, choose: random.Random) -> str:
        make_writable(place.save, False)
        return "save directory read-only"

    return _stopped(
        "read-only directory", damage, choose, refused="cannot be written to", on_tmpfs=True, max_lost=0
    )


def make_writable(directory: Path, is_writable: bool) -> None:
    """Change whether a directory of a drill may be written to; root needs a file system of its own for that."""
    if os.path.ismount(directory):
        mode = "rw" if is_writable else "ro"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(directory)], check=True)
    else:
        directory.chmod(0o755 if is_writable else 0o555)


def repair(place: Place) -> None:
    """Undo what was done to directory, teacher and data."""
    make_writable(place.save, True)
    gone = place.teacher.with_name("gone")
    if gone.exists():
        gone.rename(place.teacher)
    for kept in place.data.parent.glob("*.kept"):
        kept.rename(kept.with_suffix(""))


def _hang(choose: random.Random) -> Drill:
    layout = choose.choice([name for name, (ranks, _) in LAYOUTS.items() if ranks > 1])
    return Drill(
        "a rank that stands still",
        layout,
        False,
        (EXIT_CRASH, 128 + 6, KILLED),
        Fault("stop", "forward", choose.randrange(SAVE_INTERVAL + 1, TRAIN_ITERS - 1), choose.randrange(2)),
        flags={"--distributed-timeout-minutes": 1},
    )


_KINDS: dict[Callable[[random.Random], Drill], int] = {
    _kill: 20,
    _kill_in_save: 25,
    _kill_all: 5,
    _kill_launcher: 5,
    _terminate: 12,
    _error: 4,
    _full_disk: 5,
    _cut: 5,
    _flip: 6,
    _missing: 4,
    _bad_tracker: 3,
    _no_teacher_before: 2,
    _no_teacher_after: 2,
    _cut_data: 2,
    _read_only: 2,
    _hang: 1,
}
"""Kind -> how often among a hundred drills."""
