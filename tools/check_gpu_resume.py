"""Checkpoints of `tools/check_gpu.py`: a run that is broken off and resumed against one that is not, bit for bit.

LET in bf16 with dropout, kernels deterministic; the resume happens before S_stop and ends after it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from check_gpu_parity import student_flags, write_inputs
from check_gpu_rows import Rows, Setting, last_words

SAVED, STOP, END = 2, 3, 5


def resume(setting: Setting, rows: Rows) -> None:
    """Train once to the end and once from the checkpoint in between, each in a process of its own; compare."""
    from megatron_let.testing.training import numbers, stored_tensors
    from megatron_let.training.checkpoint_files import TRACKER

    write_inputs(setting)
    whole, resumed = (Path(setting.directory, name) for name in ("whole", "resumed"))
    seconds = _train(setting, whole)
    saved = f"iter_{SAVED:07d}"
    shutil.copytree(whole / saved, resumed / saved)
    (resumed / TRACKER).write_text(str(SAVED))
    _train(setting, resumed, {"--load": resumed})
    expected, actual = (stored_tensors(directory / f"iter_{END:07d}") for directory in (whole, resumed))
    different = [
        name for name in expected if name not in actual or not expected[name].equal(actual[name])
    ] + sorted(actual.keys() - expected.keys())
    rows.held(
        "tensors that differ after a resume, optimizer state included",
        f"{len(different)} of {len(expected)}{f': {different[0]}' if different else ''}",
        "0",
        holds=bool(expected) and not different,
        different=len(different),
    )
    logged, again = numbers(whole)[SAVED:], numbers(resumed)
    rows.held(
        "logged losses, cosines and norms after it",
        "the same"
        if logged == again
        else f"{sum(x != y for x, y in zip(logged, again, strict=False))} rows differ",
        "the same",
        holds=len(logged) == END - SAVED and logged == again,
    )
    rows.measured("the run that saved them", f"{seconds:.1f} s with start-up")


def _train(setting: Setting, directory: Path, changes: dict[str, Any] | None = None) -> float:
    """Train to the end in a process of its own and return its seconds; raises RuntimeError when it fails."""
    import time

    log, started = directory.with_suffix(".log"), time.monotonic()
    words = [sys.executable, __file__, json.dumps(run_flags(setting, directory, changes))]
    with log.open("w") as output:
        status = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        raise RuntimeError(f"training ended with exit code {status}: {last_words(log)}")
    return time.monotonic() - started


def run_flags(setting: Setting, directory: Path, changes: dict[str, Any] | None = None) -> list[str]:
    """Return the command line of a run that saves to `directory`."""
    flags: dict[str, Any] = {
        "--train-iters": END,
        "--let-stop-iters": STOP,
        "--save": directory,
        "--save-interval": SAVED,
        "--bf16": None,
        "--hidden-dropout": 0.1,
        "--deterministic-mode": None,
        **(changes or {}),
    }
    return student_flags(setting, **flags)


def main() -> int:
    """Be one run."""
    from megatron_let.testing.training import train

    return train(json.loads(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
