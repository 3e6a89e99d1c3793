"""At S_stop the teacher goes: once, on every rank, without a trace, and one line says what it cost."""

from __future__ import annotations

import itertools
import os
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_let.config.derive import resolve
from megatron_let.mcore.layer_tap import find_layer
from megatron_let.mcore.parallel import parallel_context
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training import trainer as trainer_module
from megatron_let.training.alignment import Alignment
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.signals import StopRequest
from megatron_let.training.trainer import Trainer
from tests.training.bad_input import logged_lines

STOP, TOTAL = 12, 24
# Iteration i takes 100 + i ms with the teacher and 10 + i without: each set of them has a median of its own.
SECONDS = [(100 + i if i <= STOP else 10 + i) / 1e3 for i in range(1, TOTAL + 1)]
# The medians of iterations 3 to 12 and 13 to 22, the ten on either side.
LINE = "INFO  LET teacher released at iteration 12: iteration time 107.5 ms before, 27.5 ms after"


@dataclass
class Watched:
    """What one rank had after each iteration."""

    is_owner: bool
    releases: list[int] = field(default_factory=list)  # how often it has released so far
    live_weights: list[int] = field(default_factory=list)  # of the teacher
    hooks: list[int] = field(default_factory=list)  # on layer k
    lines: list[str] = field(default_factory=list)  # that speak of the release


def train_and_watch(argv: list[str]) -> Watched:
    """Train on this rank by a clock of our own and look at what is left of the teacher after each iteration."""
    config = resolve(parse_arguments(argv), int(os.environ["WORLD_SIZE"]))
    with parallel_context(config) as context, logged_lines() as lines:
        trainer = build_trainer(config, context, StopRequest())
        alignment = trainer.run.alignment
        assert alignment is not None
        weights = [weakref.ref(w) for w in alignment.teacher.parameters()] if alignment.teacher else []
        owner = find_layer(trainer.run.parts.student.gpt_chunks, alignment.objective.student_layer)
        watched = Watched(is_owner=owner is not None)
        with patch.object(Alignment, "release", autospec=True, side_effect=Alignment.release) as release:
            for _ in _steps(trainer):
                watched.releases.append(release.call_count)
                watched.live_weights.append(sum(weight() is not None for weight in weights))
                watched.hooks.append(0 if owner is None else _num_hooks(owner[1]))
        trainer.run.reporter.close()
        watched.lines.extend(line for line in lines if "release" in line)
        return watched


def _steps(trainer: Trainer) -> Any:
    """Step to the end of the run; the clock stands but for SECONDS at the end of each iteration."""
    elapsed = [0.0, *itertools.accumulate(SECONDS)]
    clock = SimpleNamespace(perf_counter=lambda: elapsed[trainer.state.iteration], monotonic=time.monotonic)
    with patch.object(trainer_module, "time", clock):
        iterators = trainer.open_data()
        while trainer.state.iteration < TOTAL:
            trainer.step(iterators)
            yield


def _num_hooks(layer: torch.nn.Module) -> int:
    return len(layer._forward_hooks)


@pytest.mark.parametrize(
    ("owners", "student_layer"),
    [([True], 2), ([True, False], 1), ([False, True], 4)],
    ids=["one-process", "first-stage", "last-stage"],
)
def test_the_teacher_is_released_once_on_every_rank_and_nothing_of_it_stays(
    owners: list[bool], student_layer: int, pool: RankPool, token_files: Path, teacher: Path
) -> None:
    changes = {
        "--data-path": token_files,
        "--global-batch-size": 2,
        "--train-iters": TOTAL,
        "--pipeline-model-parallel-size": len(owners),
        "--let-teacher-load": teacher,
        "--let-student-layer": student_layer,
        "--let-stop-iters": STOP,
    }
    ranks = pool.run(len(owners), train_and_watch, arguments(TINY_STUDENT, changes))
    assert [rank.is_owner for rank in ranks] == owners
    for rank in ranks:
        assert rank.releases == [0] * STOP + [1] * (TOTAL - STOP)
        assert rank.hooks == [int(rank.is_owner)] * STOP + [0] * (TOTAL - STOP)
        assert [n > 0 for n in rank.live_weights] == [rank.is_owner] * STOP + [False] * (TOTAL - STOP)
        assert rank.lines == [LINE]
