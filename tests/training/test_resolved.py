"""What a run settled for: said once in the log, and in the settings file of every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.derive import resolve
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train
from megatron_let.training.arguments import parse_arguments
from tests.training.bad_input import logged_lines

PP2_VP2 = {"--pipeline-model-parallel-size": 2, "--num-layers-per-virtual-pipeline-stage": 1}
STOCK = "layers: stock (PyTorch attention)"


def train_and_listen(argv: list[str]) -> list[str]:
    """Train and return what this rank logged."""
    with logged_lines() as lines:
        train(argv)
    return lines


CASES: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    "defaults": (1, {}, ["LET: student layer 1 of 4 on pipeline stage 0, weight 0.1 to 0 at iteration 1, last layer"]),
    "pipeline": (
        2,
        {**PP2_VP2, "--let-student-layer": 4, "--let-stop-fraction": 0.6, "--let-weight": 2, "--let-teacher-layer": 1},
        ["LET: student layer 4 of 4 on pipeline stage 1, weight 2.0 to 0 at iteration 3, layer 1"],
    ),
    "plain": (1, {"--let-teacher-load": False, "--no-gradient-accumulation-fusion": None}, ["fusions: none", "LET: off"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_log_and_every_checkpoint_say_what_was_resolved(
    case: str, teacher: Path, pool: RankPool, tmp_path: Path
) -> None:
    world_size, changes, expected = CASES[case]
    base = {
        "--mock-data": None,
        "--let-teacher-load": teacher,
        "--save": tmp_path / "run",
        "--save-interval": 2,
    }
    words = arguments(TINY_STUDENT, {**base, **changes})
    for said in pool.run(world_size, train_and_listen, words):
        (line,) = (message.removeprefix("INFO ") for message in said if message.startswith("INFO layers: "))
        assert all(part in line for part in [STOCK, *expected])
    config = resolve(parse_arguments(words), world_size)
    files = sorted((tmp_path / "run").glob("iter_*/settings.yaml"))
    assert [path.parent.name for path in files] == ["iter_0000002", "iter_0000004", "iter_0000005"]
    for path in files:
        assert resolve(parse_arguments(["--config", str(path)]), world_size) == config
        assert path.read_text().splitlines()[-3:] == [f"# {choice}" for choice in line.split(" | ")]
