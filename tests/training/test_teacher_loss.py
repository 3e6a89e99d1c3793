"""The teacher's own loss stands in the log after the first iteration, whatever rank holds the teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_let.config.derive import resolve
from megatron_let.let.own_loss import own_loss
from megatron_let.mcore.model import unwrap
from megatron_let.mcore.parallel import parallel_context
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.megatron_teacher import load_megatron_teacher
from megatron_let.training.signals import StopRequest
from megatron_let.training.teacher_loss import TeacherLoss
from tests.training.bad_input import logged_lines, run

LINE = "teacher's own loss"


def told(loss: float, count: int) -> str:
    """Return the line about a teacher of 67 ids."""
    with logged_lines() as lines:
        TeacherLoss(torch.tensor([loss * count, math.log(67) * count, count], dtype=torch.float64)).tell()
    (line,) = lines
    return line


def test_a_good_teacher_is_told_and_one_like_chance_is_warned_of() -> None:
    assert told(3.0, 40) == "INFO teacher's own loss on the first batch: 3.000 (guessing: 4.205)"
    assert told(4.3, 40).startswith(
        "WARNING teacher's own loss on the first batch: 4.300, no better than guessing (4.205): broken weights"
    )
    assert told(math.nan, 40).startswith("WARNING")
    assert "not known" in told(0.0, 0)


def test_a_head_that_needs_more_than_states_is_not_known() -> None:
    def head(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        raise AttributeError("router")

    states, tokens = torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.long)
    assert TeacherLoss.measure(head, states, tokens, 67).numbers.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["hf", "megatron", "middle layer"])
def test_the_line_is_the_same_on_every_layout(
    kind: str, token_files: Path, teacher: Path, start: Path, pool: RankPool
) -> None:
    changes: dict[str, Any] = {
        "--data-path": token_files,
        "--train-iters": 2,
        "--let-stop-iters": 2,
        "--let-student-layer": 3,
        "--let-teacher-load": start if kind == "megatron" else teacher,
    }
    if kind == "middle layer":
        changes["--let-teacher-layer"] = 2
    lines = []
    for world_size, layout in ((1, {}), (2, {"--pipeline-model-parallel-size": 2})):
        result = run(pool, {**changes, **layout}, world_size=world_size)
        lines.append([line for line in result.lines if LINE in line])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1, "once"
    assert ("not known" in lines[0][0]) == (kind == "middle layer")


def both_losses(argv: list[str], teacher: Path) -> tuple[float, float]:
    """Return the mean loss of one row by the student that was loaded from `teacher`, and by that as a teacher."""
    config = resolve(parse_arguments(argv), 1)
    with parallel_context(config) as context:
        trainer = build_trainer(config, context, StopRequest())
        (chunk,) = trainer.run.parts.student.chunks
        torch.manual_seed(3)
        tokens = torch.randint(60, (1, 32))
        positions = torch.arange(32)[None]
        with torch.no_grad():
            losses = unwrap(chunk).eval()(tokens, positions, None, labels=tokens.roll(-1, dims=1))  # [b, s]
        loaded = load_megatron_teacher(teacher, layer=None, dtype=torch.float32, context=context)
        head = loaded.take_lm_head()
        assert head is not None
        total, count = own_loss(head, loaded.states(tokens), tokens).tolist()
        return float(losses[0, :-1].mean()), total / count


@pytest.mark.parametrize("is_tied", [False, True])
def test_that_of_a_megatron_teacher_is_the_loss_that_it_was_trained_on(
    is_tied: bool, token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    model = {"--untie-embeddings-and-output-weights": False} if is_tied else {}
    base = {"--data-path": token_files, "--train-iters": 1, **model}
    assert run(pool, {**base, "--save": tmp_path / "teacher"}, world_size=1).code == 0
    argv = arguments(TINY_STUDENT, {**base, "--load": tmp_path / "teacher", "--finetune": None})
    expected, actual = pool.run(1, both_losses, argv, tmp_path / "teacher")[0]
    assert actual == pytest.approx(expected, abs=1e-5)  # fp32, the head's product in other parts
