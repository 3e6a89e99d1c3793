"""Importing megatron-core where packages for GPUs are installed and there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.errors import EXIT_BAD_CONFIGURATION
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]
PROGRAM = """
import megatron_let.mcore
import megatron.core.optimizer
from megatron_let.optional import has_apex, has_transformer_engine
print(megatron.core.optimizer.USING_PYTORCH_OPTIMIZER, has_transformer_engine(), has_apex())
"""


def test_without_a_gpu_kernels_for_gpus_are_left_alone(tmp_path: Path) -> None:
    """Each stand-in breaks whoever imports it, as a kernel would break that meets a tensor of the CPU."""
    for name in ("transformer_engine", "apex", "amp_C"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert ended.stdout.split() == ["True", "False", "False"], ended.stderr


@pytest.mark.parametrize("version", ["0.15.3", "0.17.1", ""])
def test_another_megatron_on_the_path_is_named(version: str, tmp_path: Path) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise KeyError('of another release')\n")
    if version:
        numbers = dict(zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True))
        (core / "package_info.py").write_text("".join(f"{name} = {n}\n" for name, n in numbers.items()))
    ended = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_let.py"), "--mock-data"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert ended.returncode == EXIT_BAD_CONFIGURATION, ended.stderr
    assert ended.stderr.strip().splitlines() == [
        f"error: megatron-core 0.16 is needed, found {version or 'one without a version'} at {core}; take it off PYTHONPATH, "
        "or pip install megatron-core==0.16.1"
    ]
