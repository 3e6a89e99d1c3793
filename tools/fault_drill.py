"""Does a run survive? Real jobs on CPU are killed, starved and damaged, and have to end with the same bits.

    python tools/fault_drill.py --drills 100             # a table; docs/reliability.md explains it
    python tools/fault_drill.py --drills 20 --seed 3 --json drills.json

Each drill starts a tiny LET run through the launcher, lets one fault happen at a stated iteration and place (no clock has
a part in it), and starts the same command again until it is done. It is passed when no start hung, the faulty one ended
with the code that is documented, no process was left, at most one save interval was lost (two where saves are written in
the background), and the final weights and optimizer state are bit for bit those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault_drill_child import VARIABLE
from fault_drill_plan import LAYOUTS, SAVE_INTERVAL, STOP_ITERS, TRAIN_ITERS, Drill, Place, plan, repair

from megatron_let.errors import EXIT_BAD_CONFIGURATION, EXIT_DONE
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    numbers,
    stored_tensors,
    training_rows,
    write_token_files,
)

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 240.0
MAX_STARTS = 3
TMPFS_BYTES = 256 << 20
_LOADED = re.compile(r"loaded \S*iter_(\d+)")


@dataclass(frozen=True)
class Start:
    """One start of a job and how it ended."""

    code: int | None
    """None: it hung and was killed."""
    text: str
    """What it printed."""
    leftovers: int
    """Processes that were there after its end."""


@dataclass(frozen=True)
class Result:
    """What came of a drill."""

    drill: str
    kind: str
    damage: str
    code: int | None
    starts: int
    resumed: bool
    bitwise: bool
    lost: int
    hung: bool
    leftovers: int
    seconds: float
    problem: str
    """Empty for a drill that was passed."""


class Drills:
    """A place with data and teacher, and the runs that nothing happens to, by layout."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._whole: dict[str, Path] = {}
        tokens = random.Random(5)
        documents = [[tokens.randrange(59) for _ in range(40)] for _ in range(200)]
        (directory / "data").mkdir()
        write_token_files(directory / "data" / "tokens", documents)
        write_tiny_teacher("llama", directory / "teacher")

    def run(self, drill: Drill, seed: int) -> Result:
        """Do one drill."""
        started = time.monotonic()
        whole = self._whole_run(drill.layout)
        place = Place(
            self._directory / "run", self._directory / "teacher", self._directory / "data" / "tokens"
        )
        with _save_directory(place.save, on_tmpfs=drill.on_tmpfs):
            try:
                return self._run(drill, place, whole, random.Random(seed), started)
            finally:
                repair(place)

    def _run(self, drill: Drill, place: Place, whole: Path, choose: random.Random, started: float) -> Result:
        flags = {**drill.flags, "--exit-interval": drill.exit_interval or False}
        first = self._start(drill, place, flags, with_fault=True)
        problems = [] if first.code in drill.ends else [f"ended with {first.code}, not {drill.ends}"]
        if drill.says is not None and drill.says not in first.text:
            problems.append(f"its words do not hold {drill.says!r}")
        reached = max((row["iteration"] for row in training_rows(place.save)), default=0)
        damage = drill.damage(place, choose) if drill.damage else ""
        starts = [first]
        if drill.refused is not None:
            refused = self._start(drill, place, drill.flags)
            starts.append(refused)
            last = refused.text.rstrip().splitlines()[-1:]
            if refused.code != EXIT_BAD_CONFIGURATION or drill.refused not in "".join(last):
                problems.append(f"was not refused but ended with {refused.code}: {last}")
            repair(place)
        for _ in range(MAX_STARTS):
            starts.append(self._start(drill, place, drill.flags))
            if starts[-1].code == EXIT_DONE:
                break
        resumed = _LOADED.search(starts[-1].text)
        lost = reached - (int(resumed.group(1)) if resumed else 0)
        is_done = starts[-1].code == EXIT_DONE
        bitwise = is_done and _same(whole, place.save)
        hung = any(start.code is None for start in starts)
        leftovers = sum(start.leftovers for start in starts)
        if not is_done:
            problems.append(f"did not get done: {starts[-1].text.rstrip().splitlines()[-1:]}")
        elif not bitwise:
            problems.append("other weights than the run that nothing happened to")
        if lost > drill.max_lost:
            problems.append(f"{lost} iterations lost, at most {drill.max_lost}")
        problems += ["hung"] * hung + [f"{leftovers} processes left"] * (leftovers > 0)
        return Result(
            drill=drill.name,
            kind=drill.kind,
            damage=damage,
            code=first.code,
            starts=len(starts),
            resumed=is_done and resumed is not None,
            bitwise=bitwise,
            lost=lost,
            hung=hung,
            leftovers=leftovers,
            seconds=round(time.monotonic() - started, 1),
            problem="; ".join(problems),
        )

    def _whole_run(self, layout: str) -> Path:
        """Return the directory of the run that nothing happens to."""
        if layout not in self._whole:
            place = Place(
                self._directory / f"whole-{layout}",
                self._directory / "teacher",
                self._directory / "data" / "tokens",
            )
            start = self._start(Drill("none", layout, False, (EXIT_DONE,)), place, {})
            if start.code != EXIT_DONE:
                raise SystemExit(
                    f"error: the run that nothing happens to ended with {start.code}:\n{start.text}"
                )
            self._whole[layout] = place.save
        return self._whole[layout]

    def _start(self, drill: Drill, place: Place, flags: dict[str, Any], *, with_fault: bool = False) -> Start:
        """Start the job and wait for its end."""
        ranks, layout = LAYOUTS[drill.layout]
        words = {
            "--train-iters": TRAIN_ITERS,
            "--save-interval": SAVE_INTERVAL,
            "--data-path": place.data,
            "--data-cache-path": self._directory / "cache",
            "--let-teacher-load": place.teacher,
            "--let-weight": 1.0,
            "--let-stop-iters": STOP_ITERS,
            "--hidden-dropout": 0.1,
            "--save": place.save,
            "--load": place.save,
            "--async-save": None if drill.is_async else False,
        }
        fault = drill.fault if with_fault else None
        program = "pretrain_let.py" if fault is None else "tools/fault_drill_child.py"
        command = [sys.executable, "-m", "megatron_let.launch", "--nproc-per-node", str(ranks), program]
        command += arguments(TINY_STUDENT, {**words, **layout, **flags})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["HF_HUB_OFFLINE"] = environment["TRANSFORMERS_OFFLINE"] = "1"
        if fault is not None:
            environment[VARIABLE] = json.dumps(asdict(fault))
        with tempfile.TemporaryFile("w+") as output:
            job = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code: int | None = job.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # its ranks end with it
                job.kill()
                job.wait()
            leftovers = _end_leftovers(str(place.save))
            output.seek(0)
            text = output.read()
        return Start(128 - code if code is not None and code < 0 else code, text, leftovers)


def _end_leftovers(mark: str) -> int:
    """Kill what is still there of a job a moment after its end; return how many processes that were."""
    left: list[int] = []
    for _ in range(50):
        left = [pid for pid in _pids_with(mark) if pid != os.getpid()]
        if not left:
            return 0
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


def _pids_with(mark: str) -> list[int]:
    """Return the running processes that have these words on their command line."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if mark in words:
            found.append(int(path.parent.name))
    return found


def _same(whole: Path, run: Path) -> bool:
    """Return whether two runs ended with the same bits and went through the same numbers."""
    import torch

    name = f"iter_{TRAIN_ITERS:07d}"
    left, right = stored_tensors(whole / name), stored_tensors(run / name)
    is_same = left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    return is_same and numbers(whole) == numbers(run)


@contextmanager
def _save_directory(path: Path, *, on_tmpfs: bool) -> Iterator[None]:
    """Have an empty save directory, on a small file system of its own if need be, and remove it."""
    path.mkdir()
    is_mounted = on_tmpfs and can_mount()
    if is_mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        if is_mounted:
            subprocess.run(["umount", str(path)], check=True)
        shutil.rmtree(path)


def can_mount() -> bool:
    """Return whether this program may mount a file system."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory]
        try:
            if subprocess.run(command, capture_output=True).returncode != 0:
                return False
        except FileNotFoundError:
            return False
        subprocess.run(["umount", directory], check=True)
    return True


def table(results: Sequence[Result]) -> str:
    """Return one row a kind, and the sum."""
    lines = [
        "| fault | drills | resumed | bitwise | most lost | hung | passed |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = list(dict.fromkeys(result.kind for result in results))
    for name, some in [(kind, [r for r in results if r.kind == kind]) for kind in kinds] + [
        ("all", list(results))
    ]:
        lines.append(
            f"| {name} | {len(some)} | {sum(r.resumed for r in some)} | {sum(r.bitwise for r in some)} | "
            f"{max(r.lost for r in some)} | {sum(r.hung for r in some)} | {sum(not r.problem for r in some)} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Do the drills; return 0 when all were passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--drills", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of their choice (default 1)")
    parser.add_argument("--only", help="only drills whose name has these words")
    parser.add_argument("--json", type=Path, help="write every drill's result here")
    options = parser.parse_args(argv)
    drills = plan(options.drills, options.seed, can_mount=can_mount())
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="fault_drill_") as directory:
        place = Drills(Path(directory))
        for number, drill in enumerate(drills, 1):
            if options.only is not None and options.only not in drill.name:
                continue
            result = place.run(drill, options.seed * 10_000 + number)
            results.append(result)
            verdict = result.problem or f"{result.lost} iterations lost, same bits"
            print(
                f"{number:3d} {result.drill}{', ' if result.damage else ''}{result.damage}: {verdict} ({result.seconds:.0f} s)",
                flush=True,
            )
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    print(table(results))
    return 0 if all(not result.problem for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
