"""The check of a node before a start, with a stand-in for nvidia-smi."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "check_node.sh"
QUERY = "--query-gpu=index,ecc.errors.uncorrected.volatile.total,retired_pages.pending,remapped_rows.pending"


def check(tmp_path: Path, gpus: str | None, **changes: str) -> tuple[int, str]:
    """Check a node whose nvidia-smi runs this shell text (None: it has none); return exit code and what was said."""
    if gpus is not None:
        stand_in = tmp_path / "nvidia-smi"
        stand_in.write_text(f'#!/usr/bin/env bash\n[ "$1" = "{QUERY}" ] || exit 9\n{gpus}\n')
        stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "save")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "node7", **changes},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


WELL = "for gpu in 0 1; do echo $gpu, 0, No, No; done"
NODES = {
    "all well": (WELL, "2", None),
    "more than given": (WELL, "1", None),
    "without ECC": ('for gpu in 0 1; do echo "$gpu, [N/A], [N/A], [N/A]"; done', "2", None),
    "no GPUs wanted, some there": (WELL, "", None),
    "a GPU is gone": ("echo 0, 0, No, No", "2", "1 GPUs answer of the 2 that Slurm gave"),
    "a warning is no GPU": (
        "echo 0, 0, No, No; echo 'WARNING: infoROM is corrupted at gpu 0000:3B:00.0'",
        "2",
        "1 GPUs answer of the 2 that Slurm gave",
    ),
    "all well, with a warning": (f"echo 'WARNING: infoROM is corrupted'; {WELL}", "2", None),
    "memory errors": ("echo 0, 0, No, No; echo 1, 3, No, No", "2", "GPU 1 has 3 uncorrected memory errors"),
    "page to retire": ("echo 0, 0, Yes, No", "1", "GPU 0 waits for a reset"),
    "row to remap": ("echo 0, 0, [N/A], Yes", "1", "GPU 0 waits for a reset"),
    "driver is gone": ("echo no driver; exit 9", "2", "nvidia-smi does not answer: no driver"),
    "driver is gone, none wanted": ("echo no driver; exit 9", "", "nvidia-smi does not answer: no driver"),
}


@pytest.mark.parametrize("node", NODES)
def test_gpus(node: str, tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    gpus, wanted, why = NODES[node]
    code, said = check(tmp_path, gpus, SLURM_GPUS_ON_NODE=wanted)
    assert code == (why is not None)
    assert said.startswith("" if why is None else f"node7: {why}")
    assert said.count("\n") == code
    assert list((tmp_path / "save").iterdir()) == []


def test_places_that_cannot_be_written_to_and_a_full_disk(tmp_path: Path) -> None:
    code, said = check(tmp_path, WELL)
    assert (code, said) == (1, f"node7: {tmp_path / 'save'} cannot be written to\n")
    (tmp_path / "save").mkdir()
    assert check(tmp_path, WELL, TMPDIR="/proc") == (1, "node7: /proc cannot be written to\n")
    code, said = check(tmp_path, WELL, MIN_FREE_MB=str(1 << 40))
    assert code == 1
    assert said.endswith(f" MB are free in {tmp_path / 'save'}\n")
