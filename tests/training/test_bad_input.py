"""Bad input end to end: real ranks under the launcher and under bare torchrun, one line, code 2, nothing written over.

Which mistakes are found, and with what words, is tested without programs in the files named test_bad_*.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_let.testing.training import TINY_STUDENT, arguments
from tests.processes import HANG_SECONDS
from tests.training.bad_input import content_of

ROOT = Path(__file__).parents[2]

OURS = ["megatron_let.launch"]
TORCHRUN = ["torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def launched(launcher: list[str], changes: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run pretrain_let.py on two ranks to its end."""
    program = [str(ROOT / "pretrain_let.py"), *arguments(TINY_STUDENT, changes)]
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return subprocess.run(
        [sys.executable, "-m", *launcher, "--nproc-per-node", "2", *program],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env={name: value for name, value in os.environ.items() if name not in ours},
        cwd=ROOT,
        check=False,
    )


@pytest.fixture
def saved(start: Path, tmp_path: Path) -> Path:
    """Return a copy of a run's directory: a checkpoint, its metrics, and the exit status of the run that made it."""
    directory = Path(shutil.copytree(start, tmp_path / "run"))
    (directory / "exit_status.json").write_text('{"exit_code": 0}')
    return directory


@pytest.fixture
def mistakes(saved: Path, token_files: Path, teacher: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Return runs that each hold one mistake, all of them resuming from and saving to `saved`."""
    spoilt = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    weights = load_file(spoilt / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")  # seen by the stage that runs the teacher, the last
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    base = {"--data-path": token_files, "--train-iters": 3, "--save": saved, "--load": saved}
    let = {"--let-stop-iters": 3, "--let-override": None}
    on_last_stage = {"--pipeline-model-parallel-size": 2, "--let-student-layer": 3}
    return {
        "unknown flag": {**base, "--num-layer": 4},
        "settings": {**base, "--num-layers": 3, "--pipeline-model-parallel-size": 2},
        "teacher": {**base, **on_last_stage, **let, "--let-teacher-load": spoilt},
        "checkpoint": {**base, "--strict-load": None},
    }


LINES = {
    "unknown flag": "error: unknown flag --num-layer; did you mean --num-layers?",
    "settings": "error: --num-layers 3 is not a multiple of --pipeline-model-parallel-size 2",
    "teacher": "error: teacher {teacher} gives states that are not finite in torch.float32",
    "checkpoint": "error: checkpoint {saved}/iter_0000002 is damaged: __0_1.distcp does not match its checksum",
}
RUNS = [("settings", OURS), ("teacher", OURS), ("checkpoint", OURS), ("unknown flag", TORCHRUN), ("teacher", TORCHRUN)]  # fmt: skip


@pytest.mark.parametrize(
    ("mistake", "launcher"), RUNS, ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_a_mistake_is_one_line_and_code_2_and_nothing_is_written_over(
    mistake: str, launcher: list[str], mistakes: dict[str, dict[str, Any]], saved: Path, tmp_path: Path
) -> None:
    if mistake == "checkpoint":
        path = saved / "iter_0000002" / "__0_1.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = content_of(tmp_path)
    result = launched(launcher, mistakes[mistake])
    output = result.stdout + result.stderr
    said = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(said) == 1, output
    assert said[0].startswith(LINES[mistake].format(saved=saved, teacher=tmp_path / "teacher"))
    assert content_of(tmp_path) == before
    status = json.loads((saved / "exit_status.json").read_text())
    assert (status["exit_code"], status["reason"], status["iteration"]) == (2, "bad configuration", None)
    assert status["message"] == said[0]
    if launcher is OURS:
        assert result.returncode == 2
        assert "Traceback" not in output
        assert result.stderr.splitlines()[-1] == said[0]
    else:  # what follows is torchrun's own page, which also has a code of its own
        assert result.returncode == 1
        assert "Traceback" not in result.stdout
        assert "Traceback" not in result.stderr.split(said[0])[0]
