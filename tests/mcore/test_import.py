"""Importing megatron-core where packages for GPUs are installed and there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
        timeout=120,
        check=False,
    )
    assert ended.stdout.split() == ["True", "False", "False"], ended.stderr
