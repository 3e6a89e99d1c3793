"""The pipeline's arithmetic against a schedule that is played through, and against what the program accepts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_let.config.checks.rules import Packages
from megatron_let.config.derive import resolve
from megatron_let.errors import ConfigError
from megatron_let.planning.pipeline import Pipeline, dealt
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments

FOUR = Pipeline(layers=dealt((8, 8, 8, 8), 1), layer=3.0, head=9.0, num_microbatches=16, num_chunks=1)


def played_through(stages: list[float], num_microbatches: int) -> float:
    """Return when one-forward-one-backward ends: a stage's forward takes 1/3 of its cost, its backward 2/3."""
    orders = []
    for stage in range(len(stages)):
        warm_up = min(len(stages) - stage - 1, num_microbatches)
        order = [("f", index) for index in range(warm_up)]
        for index in range(num_microbatches - warm_up):
            order += [("f", warm_up + index), ("b", index)]
        orders.append(order + [("b", index) for index in range(num_microbatches - warm_up, num_microbatches)])
    ends: dict[tuple[int, str, int], float] = {}
    free = [0.0] * len(stages)
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, index = order[0]
            before = (stage - 1, "f", index) if kind == "f" else (stage + 1, "b", index)
            if 0 <= before[0] < len(stages) and before not in ends:
                continue
            share = stages[stage] / 3 * (1 if kind == "f" else 2)
            free[stage] = ends[stage, kind, index] = max(free[stage], ends.get(before, 0.0)) + share
            order.pop(0)
    return max(free)


def test_even_stages_take_what_the_schedule_takes() -> None:
    even = replace(FOUR, head=0.0)
    assert even.iteration(even.stages()) == pytest.approx(played_through(even.stages(), 16))


@pytest.mark.parametrize("slow", [0, 1, 2, 3])
def test_one_slow_stage_sets_the_pace(slow: int) -> None:
    stages = [24.0] * 4
    stages[slow] = 60.0
    # What stages before the slow one do while the pipeline fills and drains is partly hidden: less than one microbatch.
    for num_microbatches in (4, 16, 64):
        played = played_through(stages, num_microbatches)
        estimate = replace(FOUR, num_microbatches=num_microbatches).iteration(stages)
        assert played <= estimate < played + 3 * 24.0
    assert estimate == pytest.approx(played, rel=0.02)


def test_the_teacher_is_on_the_stage_of_layer_k() -> None:
    assert FOUR.stages(5.0, student_layer=8) == [29, 24, 24, 33]
    assert FOUR.stages(5.0, student_layer=9) == [24, 29, 24, 33]
    # two chunks a stage: layers 1-4, 5-8, 9-12, 13-16, then the same stages again
    chunks = replace(FOUR, layers=dealt((8, 8, 8, 8), 2), num_chunks=2)
    assert [chunks.owner(layer) for layer in (4, 5, 16, 17, 32)] == [0, 1, 3, 0, 3]


def test_shared_work_costs_less_the_more_share_it() -> None:
    alone, tensor, all_stages = (
        FOUR.slowdown(24.0, 4, share=share, tensor_size=4) for share in ("none", "tensor", "tensor-pipeline")
    )
    assert alone == pytest.approx((16 * 48 + 24 * 2 + 33) / (16 * 33 + 72))
    # 24 + 24 / 4 is still less than the last stage has with the output layer: only filling and draining take longer
    assert tensor == pytest.approx((16 * 33 + 72 + 6) / (16 * 33 + 72))
    assert all_stages == pytest.approx((16 * 34.5 + 3 * 25.5) / (16 * 33 + 72))


@pytest.mark.parametrize(("layers", "stages", "chunks"), [(12, 4, 1), (12, 2, 1), (12, 3, 1), (12, 3, 2)])
def test_the_other_splits_are_those_that_a_run_accepts(layers: int, stages: int, chunks: int) -> None:
    pipeline = Pipeline(dealt((layers // stages,) * stages, chunks), 1.0, 0.0, 6, chunks)
    proposed = {tuple(map(len, split.layers)) for split in pipeline.other_splits()}
    assert all(sum(split) == layers for split in proposed)
    accepted = {
        (first, last)
        for first in range(1, layers)
        for last in range(1, layers)
        if is_accepted(layers, stages, chunks, first, last)
    }
    assert {(split[0], split[-1]) for split in proposed} == accepted


def is_accepted(layers: int, stages: int, chunks: int, first: int, last: int) -> bool:
    flags: dict[str, Any] = {
        "--num-layers": layers,
        "--pipeline-model-parallel-size": stages,
        "--num-virtual-stages-per-pipeline-rank": chunks if chunks > 1 else False,
        "--decoder-first-pipeline-num-layers": first,
        "--decoder-last-pipeline-num-layers": last,
        "--global-batch-size": 12,
        "--mock-data": None,
    }
    try:
        resolve(parse_arguments(arguments(TINY_STUDENT, flags)), stages, Packages(True, True))
    except ConfigError:
        return False
    return True
