"""Where layer k is, whatever deals the layers, and the splits that a plan proposes: the program must take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.planning.pipeline import dealt
from megatron_let.planning.plan import RunPlan
from megatron_let.planning.table import plan_lines
from megatron_let.training import plan_split
from tests.training import planned
from tests.training.planned import MOCK

COUNTED: dict[str, Any] = {
    "--account-for-embedding-in-pipeline-split": None,
    "--account-for-loss-in-pipeline-split": None,
}
CHUNKS = "--num-virtual-stages-per-pipeline-rank"
PER_CHUNK = "--num-layers-per-virtual-pipeline-stage"
# An output layer that is worth seven layers.
WIDE_HEAD = {"--num-layers": 8, "--vocab-size": 3000}


def plan_of(changes: dict[str, Any], stages: int = 2, **settings: Any) -> RunPlan:
    flags = {**MOCK, "--pipeline-model-parallel-size": stages, **changes}
    return planned.plan_of(flags, stages, **settings)


@pytest.mark.parametrize(
    ("stages", "changes", "layer", "owner"),
    [
        (2, {"--num-layers": 14, CHUNKS: 4, **COUNTED}, 4, 0),  # 1, 4-5, ... and 2-3, 6-7, ...
        (2, {"--num-layers": 6, CHUNKS: 2, **COUNTED}, 5, 0),  # 1, 4-5 and 2-3, 6
        (4, {"--num-layers": 2, **COUNTED}, 2, 2),  # none, 1, 2, none
    ],
)
def test_the_teacher_is_planned_on_the_stage_that_builds_layer_k(
    stages: int, changes: dict[str, Any], layer: int, owner: int, teacher: Path
) -> None:
    flags = {**changes, "--let-teacher-load": teacher, "--let-student-layer": layer}
    plan = plan_of(flags, stages)
    assert plan.teacher is not None
    assert plan.teacher.stage == owner
    assert [stage.stage for stage in plan.stages if layer in stage.layers] == [owner]
    assert [stage.teacher_flops > 0 for stage in plan.stages] == [index == owner for index in range(stages)]
    assert plan.teacher.slowdown["none"] > 1


def test_layers_are_dealt_as_the_program_deals_them() -> None:
    ends = {"--decoder-first-pipeline-num-layers": 2, "--decoder-last-pipeline-num-layers": 6}
    plan = plan_of({"--num-layers": 12, "--global-batch-size": 6, CHUNKS: 2, **ends}, 3)
    assert tuple(stage.layers for stage in plan.stages) == dealt((2, 4, 6), 2)


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        ({}, ()),
        (COUNTED, tuple(COUNTED)),
        ({PER_CHUNK: 2}, (PER_CHUNK,)),
        ({PER_CHUNK: 4}, (PER_CHUNK,)),
        ({"--decoder-last-pipeline-num-layers": 3}, ("--decoder-last-pipeline-num-layers",)),
        ({"--num-layers": 6, PER_CHUNK: 2, **COUNTED}, (*COUNTED, PER_CHUNK)),
    ],
)
def test_a_proposed_split_is_one_that_the_program_takes(
    changes: dict[str, Any], replaced: tuple[str, ...]
) -> None:
    flags = {**WIDE_HEAD, **changes}
    plan = plan_of(flags)
    split = plan.better_split
    assert split is not None
    assert split.replaced == replaced
    (line,) = (line for line in plan_lines(plan) if line.startswith("better split"))
    assert (f"in place of {' '.join(replaced)} (layers" in line) is bool(replaced)
    words = split.flags.split()
    kept = {flag: value for flag, value in flags.items() if flag not in replaced}
    better = plan_of({**kept, **dict(zip(words[::2], words[1::2], strict=True))})
    assert tuple(len(stage.layers) for stage in better.stages) == split.layers
    assert better.layout["chunks a stage"] == plan.layout["chunks a stage"]
    assert better.better_split is None


def test_a_split_that_a_rule_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    best = plan_of(WIDE_HEAD).better_split
    assert best is not None

    def refuse(config: RunConfig, *_: Any) -> list[ConfigError]:
        is_best = config.transformer.num_layers_in_first_pipeline_stage == best.layers[0]
        return [ConfigError("not this one")] * is_best

    monkeypatch.setattr(plan_split, "problems", refuse)
    second = plan_of(WIDE_HEAD).better_split
    assert second is not None
    assert second.layers != best.layers
    assert second.saved < best.saved


def test_no_split_is_proposed_that_a_gpu_cannot_hold() -> None:
    flags = {"--num-layers": 6, "--vocab-size": 1000, "--seq-length": 256}
    plan = plan_of(flags)
    first, last = (stage.memory.after_stop for stage in plan.stages)
    assert first > last
    assert plan.better_split is not None
    assert plan.better_split.layers == (4, 2)
    assert plan_of(flags, gpu_memory_gib=1.34 * first / 0.9 / 2**30).better_split == plan.better_split
    assert plan_of(flags, gpu_memory_gib=1.33 * first / 0.9 / 2**30).better_split is None


def test_a_split_is_proposed_where_one_stage_is_too_full_anyway() -> None:
    flags = {"--num-layers": 6, "--decoder-first-pipeline-num-layers": 5}
    plan = plan_of(flags, gpu_memory_gib=0.0001)
    assert plan.better_split == plan_of(flags).better_split is not None


def test_the_teacher_s_share_of_a_run_goes_by_its_samples(teacher: Path) -> None:
    flags: dict[str, Any] = {"--num-layers": 6, "--decoder-first-pipeline-num-layers": 4}
    flags |= {"--let-teacher-load": teacher, "--let-student-layer": 1}
    # a fifth of the samples: 16 of 80
    steady = plan_of({**flags, "--train-iters": 10, "--let-stop-iters": 2}).better_split
    growing = {"--rampup-batch-size": [4, 4, 8], "--let-stop-iters": 3}
    growing |= {"--train-iters": False, "--train-samples": 80}
    assert steady is not None
    assert plan_of({**flags, **growing}).better_split == steady
