"""Check this project on one GPU in under ten minutes: `bash scripts/check_gpu.sh`, which starts this program.

    python tools/check_gpu.py [--parts parity resume ...] [--json runs/check_gpu.json]
    python tools/check_gpu.py --device cpu --size tiny      # the same parts without a GPU: what the tests run

One table: what was measured, its bound, and whether it holds; the same as JSON. Each part runs in a process of its own
with a time limit, so that a crash or a hang is a row and the rest still runs. Exit code: 0 when no row failed, 1 when one
did, 2 without a GPU. Parts and their bounds: tools/check_gpu_parts.py and tools/check_gpu_parity.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from check_gpu_rows import FAILED, NOT_RUN, PASSED, Row, Setting, last_words, read_rows, table

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tools" / "check_gpu_parts.py"
PART_SECONDS = {
    "environment": 60,
    "parity": 170,
    "steps-bf16": 100,
    "steps-fp8": 100,
    "let": 130,
    "release": 80,
    "resume": 120,
}
"""Longest time of each part; together they get TOTAL_SECONDS."""

TOTAL_SECONDS = 570


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: for a CPU")
    parser.add_argument("--parts", choices=tuple(PART_SECONDS), nargs="+", default=tuple(PART_SECONDS))
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "check_gpu.json")
    parser.add_argument(
        "--seconds",
        type=float,
        default=TOTAL_SECONDS,
        help="for all parts together; each part gets its share",
    )
    return parser.parse_args(argv)


def run_part(
    part: str, setting: Setting, *, limit: float, program: Path = PROGRAM
) -> tuple[list[Row], float]:
    """Run one part in a process of its own; return its rows and how many seconds it took."""
    if limit <= 0:
        return [Row(part, "the whole part", None, None, FAILED, "no time was left for it")], 0.0
    rows_file = Path(setting.directory, f"{part}.json")
    setting_file = Path(setting.directory, f"{part}.setting.json")
    setting_file.write_text(json.dumps(asdict(setting)), encoding="utf-8")
    log, started = rows_file.with_suffix(".log"), time.monotonic()
    command = [sys.executable, str(program), part, str(setting_file)]
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment_of(setting),
            start_new_session=True,
        )
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)
    rows = read_rows(rows_file)
    if status is None:
        rows.append(Row(part, "time", f"over {limit:.0f} s", f"{limit:.0f} s", FAILED, last_words(log)))
    elif status != 0:
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        rows.append(Row(part, "the process", how, "exit code 0", FAILED, last_words(log)))
    elif not rows:
        rows.append(Row(part, "the whole part", None, None, FAILED, "it measured nothing"))
    return rows, time.monotonic() - started


def environment_of(setting: Setting) -> dict[str, str]:
    """Return the environment of a part: no network, no launcher's variables, the GPU hidden when it is not wanted."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    path = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment.update(
        PYTHONPATH=os.pathsep.join(path),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        WANDB_MODE="offline",
        PYTHONWARNINGS="ignore",
    )
    if setting.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the part and whatever it started, which stand in a session of their own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def check(arguments: argparse.Namespace, directory: str) -> int:
    """Run the parts, print the table, write the JSON file and return the exit code."""
    setting = Setting(arguments.device, arguments.size, directory)
    deadline, rows, seconds = time.monotonic() + arguments.seconds, list[Row](), dict[str, float]()
    for part in arguments.parts:
        print(f"{part} ...", end=" ", flush=True)
        share = PART_SECONDS[part] * arguments.seconds / TOTAL_SECONDS
        limit = min(share, deadline - time.monotonic())
        found, seconds[part] = run_part(part, setting, limit=limit)
        print(f"{seconds[part]:.0f} s", flush=True)
        rows += found
    print(f"\n{table(rows)}\n")
    counts = {result: sum(row.result == result for row in rows) for result in (PASSED, FAILED, NOT_RUN)}
    total = sum(seconds.values())
    print(f"{', '.join(f'{count} {name}' for name, count in counts.items())}; {total:.0f} s in all")
    report = {"rows": [asdict(row) for row in rows], "seconds": seconds, **asdict(setting)}
    del report["directory"]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.json}")
    return 1 if counts[FAILED] else 0


def has_gpu() -> bool:
    """Return whether torch sees a GPU; asked before anything is started."""
    import torch

    return torch.cuda.is_available()


def main(argv: Sequence[str] | None = None) -> int:
    """Check, unless there is no GPU."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        is_possible = arguments.device == "cpu" or has_gpu()
    except ModuleNotFoundError as error:
        print(f"{error}: nothing was checked; set PYTHON to an interpreter that has torch and megatron-core")
        return 2
    if not is_possible:
        print("no GPU is visible: nothing was checked (--device cpu --size tiny runs the parts on the CPU)")
        return 2
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as directory:
        return check(arguments, directory)


if __name__ == "__main__":
    sys.exit(main())
