"""Does a run stay as large as it is? Memory, open files and threads of one rank over thousands of tiny iterations.

    python tools/long_run.py --iterations 5000 --saves 50      # LET on to the half of them, on two ranks

prints them at ten points of the run and, from the tenth of it on, the slope of the resident memory: what a month's run
would lose by it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.tiny_teachers import write_tiny_teacher
from megatron_let.testing.training import TINY_STUDENT, arguments, train, write_token_files

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Point:
    """What a rank holds after an iteration."""

    iteration: int
    resident_bytes: int
    objects: int
    """That Python's garbage collector knows."""
    open_files: int
    threads: int


def course(argv: list[str], every: int) -> list[Point]:
    """Train on this rank and return what it holds after every so many iterations."""
    from megatron_let.training.trainer import Trainer

    points: list[Point] = []
    step = Trainer.step

    def observed(self: Trainer, iterators: Any) -> None:
        step(self, iterators)
        if self.state.iteration % every == 0:
            points.append(_point(self.state.iteration))

    with patch.object(Trainer, "step", observed):
        train(argv)
    return points


def _point(iteration: int) -> Point:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Point(
        iteration,
        pages * _PAGE_BYTES,
        len(gc.get_objects()),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
    )


def long_run(directory: Path, iterations: int, saves: int, *, every: int) -> list[list[Point]]:
    """Train two ranks, with LET to the half, saving in the background; return the points of each rank."""
    write_token_files(
        directory / "tokens", [[index % 59 for index in range(7 * i, 7 * i + 40)] for i in range(500)]
    )
    write_tiny_teacher("llama", directory / "teacher")
    words = {
        "--data-path": directory / "tokens",
        "--let-teacher-load": directory / "teacher",
        "--let-stop-iters": iterations // 2,
        "--train-iters": iterations,
        "--global-batch-size": 2,
        "--log-interval": 50,
        "--save": directory / "run",
        "--save-interval": iterations // saves,
        "--save-keep-last": 2,
        "--async-save": None,
        "--use-distributed-optimizer": None,
    }
    with RankPool(2) as pool:
        return pool.run(2, course, arguments(TINY_STUDENT, words), every, timeout=3600)


def growth(points: Sequence[Point]) -> float:
    """Return the slope of the resident memory in bytes an iteration, by least squares over the second half."""
    half = points[len(points) // 2 :]
    mean_x = sum(point.iteration for point in half) / len(half)
    mean_y = sum(point.resident_bytes for point in half) / len(half)
    above = sum((point.iteration - mean_x) * (point.resident_bytes - mean_y) for point in half)
    return above / sum((point.iteration - mean_x) ** 2 for point in half)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--iterations", type=int, default=5000, help="default 5000")
    parser.add_argument("--saves", type=int, default=50, help="default 50")
    parser.add_argument("--json", type=Path, help="write all points here")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="long_run_") as directory:
        every = max(1, options.iterations // 100)
        ranks = long_run(Path(directory), options.iterations, options.saves, every=every)
    for rank, points in enumerate(ranks):
        print(
            f"rank {rank}\n| iteration | resident MB | Python objects | open files | threads |\n|---:|---:|---:|---:|---:|"
        )
        for point in points[9::10]:
            print(
                f"| {point.iteration} | {point.resident_bytes / 1e6:.1f} | {point.objects} | {point.open_files} | "
                f"{point.threads} |"
            )
        print(f"growth over the second half: {growth(points):+.0f} bytes an iteration")
    if options.json is not None:
        options.json.write_text(
            json.dumps([[asdict(point) for point in points] for points in ranks], indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
