"""LET attached to a foreign loop with Megatron-LM's signatures: the bits of this project's own trainer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_let.errors import ConfigError
from megatron_let.let import AlignmentObjective, LetSchedule, load_hf_teacher
from megatron_let.mcore.model import build_gpt
from megatron_let.mcore.parallel import parallel_context
from megatron_let.mcore.transformer_config import build_transformer_config
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.one_iteration import Tensors
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.attach import AttachedLet, HostLoop, attach_let
from tests.training import megatron_lm_stand_in as stand_in
from tests.training.foreign_loop import (
    EOD,
    GLOBAL_BATCH,
    ITERATIONS,
    PADDING,
    STOP,
    Samples,
    both,
    host_course,
    our_course,
    settings_of,
)

TP2_SP = {"--tensor-model-parallel-size": 2, "--sequence-parallel": None}
PP2 = {"--pipeline-model-parallel-size": 2}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one-process": (1, {}),
    "fp16": (1, {"--fp16": None, "--initial-loss-scale": 1024}),
    "per-token": (1, {"--calculate-per-token-loss": None}),
    "dp2": (2, {}),
    "tp2-sp": (2, TP2_SP),
    "pp2": (2, PP2),
    "pp2-last-stage": (2, {**PP2, "--let-student-layer": 4}),
    "pp2-vp2": (2, {**PP2, "--num-layers-per-virtual-pipeline-stage": 1, "--let-student-layer": 3}),
    "pp4-middle-stage": (4, {"--pipeline-model-parallel-size": 4}),
}


NAMES = ("let loss", "let cosine", "let cosine centered", "let weight")


@pytest.fixture(scope="module")
def base(token_files: Path, teacher: Path) -> dict[str, Any]:
    """Return the flags of a run with LET that ends before the run does."""
    return {
        **TINY_STUDENT,
        "--data-path": token_files,
        "--eod-mask-loss": None,
        "--global-batch-size": GLOBAL_BATCH,
        "--train-iters": ITERATIONS,
        "--lr-decay-style": "constant",
        "--make-vocab-size-divisible-by": PADDING,
        "--let-teacher-load": teacher,
        "--let-student-layer": 2,
        "--let-weight": 1.0,
        "--let-stop-iters": STOP,
    }


def different(left: Tensors, right: Tensors) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_loop_computes_the_bits_of_our_own(case: str, pool: RankPool, base: dict[str, Any]) -> None:
    world_size, changes = CASES[case]
    ranks = pool.run(world_size, both, arguments(base, changes))
    ours, host = ranks[0]
    assert len(ours.gradients) == len(host.gradients) == ITERATIONS
    for expected, actual in zip(ours.gradients, host.gradients, strict=True):
        assert different(expected, actual) == []
    assert different(ours.weights, host.weights) == []
    for expected_hooks, actual_hooks in ((o.num_hooks, h.num_hooks) for o, h in ranks):
        assert actual_hooks == expected_hooks
    assert sum(host.num_hooks[-1] for _, host in ranks) == sum(host.num_hooks[0] for _, host in ranks) - (
        world_size if "--pipeline-model-parallel-size" not in changes else 1
    )
    reports = [numbers for _, host in ranks for numbers in host.numbers]
    assert len(reports) == STOP, "one rank speaks, once an iteration"
    for report, row in zip(reports, ours.numbers, strict=True):
        assert report == pytest.approx(row, rel=1e-5, abs=1e-6)  # as many digits are printed
    assert [host.written for _, host in ranks[:-1]] == [[]] * (world_size - 1), (
        "the last rank has the writers"
    )
    written = [(name, iteration) for name, _, iteration in ranks[-1][1].written]
    assert written == [(name, iteration) for iteration in range(1, STOP + 1) for name in NAMES]
    losses = [value for name, value, _ in ranks[-1][1].written if name == "let loss"]
    assert losses == pytest.approx([loss for loss, _, _ in reports], rel=1e-5)


def with_long_intervals(argv: Sequence[str], evaluates: bool) -> tuple[list[Any], list[Any]]:
    """Run the stand-in's loop, reporting every second iteration."""
    samples = Samples(*(torch.randint(EOD, (ITERATIONS * GLOBAL_BATCH, 32)) for _ in range(2)))
    with nullcontext() if evaluates else patch.object(stand_in, "_evaluate"):
        course = host_course(argv, samples, log_interval=2)
    return course.numbers, course.written


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_rest_of_the_last_interval_is_reported(
    evaluates: bool, pool: RankPool, base: dict[str, Any]
) -> None:
    """By the evaluation after it, or where there is none by `finish`."""
    argv = arguments(base, {"--let-stop-iters": ITERATIONS})
    ((numbers, written),) = pool.run(1, with_long_intervals, argv, evaluates)
    assert len(numbers) == 2
    assert [iteration for name, _, iteration in written if name == "let loss"] == [2, ITERATIONS]


def resumed_after_stop(argv: Sequence[str]) -> list[int]:
    """Run the stand-in from S_stop on."""
    samples = Samples(*(torch.randint(EOD, (GLOBAL_BATCH, 32)) for _ in range(2)))
    return host_course(argv, samples, start=STOP).num_hooks


def test_a_run_resumed_after_s_stop_needs_no_teacher(
    pool: RankPool, base: dict[str, Any], tmp_path: Path
) -> None:
    words = arguments(base, {"--let-teacher-load": tmp_path / "gone"})
    assert pool.run(1, resumed_after_stop, words) == [[0]]


def resumed_before_stop(argv: Sequence[str]) -> str:
    """Run the stand-in with a teacher that is needed and is gone."""
    samples = Samples(*(torch.randint(EOD, (GLOBAL_BATCH, 32)) for _ in range(2)))
    try:
        host_course(argv, samples, start=STOP - 1)
    except ConfigError as error:
        return str(error)
    return "trained"


def test_a_run_resumed_before_s_stop_says_that_the_teacher_is_gone(
    pool: RankPool, base: dict[str, Any], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    message = pool.run(1, resumed_before_stop, arguments(base, {"--let-teacher-load": gone}))[0]
    assert str(gone) in message


def refusals(argv: Sequence[str]) -> dict[str, str]:
    """Attach LET to what it is not for; return what it says."""
    config, messages = settings_of(argv), {}
    with parallel_context(config) as context:
        core_config = build_transformer_config(config, is_on_gpu=False)
        gpt = build_gpt(
            config,
            core_config,
            padded_vocab_size=72,
            groups=context.groups,
            pre_process=True,
            post_process=True,
            vp_stage=None,
            has_te_layers=False,
        )
        loop = HostLoop(iteration=lambda: 0, num_microbatches=lambda: 1)

        def attach(name: str, model: list[Any], layer: int, load: Any = no_teacher) -> None:
            objective = AlignmentObjective(LetSchedule(1.0, STOP), layer)
            try:
                attach_let(model, loop, load_teacher=load, objective=objective, num_ids=68)
            except ConfigError as error:
                messages[name] = str(error)

        def load_teacher(device: torch.device) -> Any:
            torch.rand(1)  # as some models' building does
            return load_hf_teacher(
                config.let.let_teacher_load, layer=None, dtype=torch.float32, device=device
            )

        attach("no GPT", [torch.nn.Linear(2, 2)], 1)
        attach("no chunk", [], 1)
        attach("layer", [gpt], 5)
        before = torch.get_rng_state()
        attach("ids", [gpt], 1, load_teacher)
        assert torch.get_rng_state().equal(before), "the student's dropout must not depend on the teacher"
        core_config.context_parallel_size = 2
        attach("context parallel", [gpt], 1)
    return messages


def no_teacher(device: torch.device) -> Any:
    raise AssertionError("refused before a teacher is loaded")


def test_what_it_is_not_for_is_refused(pool: RankPool, base: dict[str, Any]) -> None:
    messages = pool.run(1, refusals, arguments(base))[0]
    assert "the student's token ids reach 67 but teacher" in messages.pop("ids")
    assert messages == {
        "no GPT": "a model chunk is a Linear; LET knows megatron-core's GPTModel in its own DistributedDataParallel",
        "no chunk": "there is no model chunk on this rank",
        "layer": "LET: student layer 5 of a model with layers 1 to 4",
        "context parallel": "LET is not attached to context-parallel runs of other programs; use pretrain_let.py",
    }


def test_a_stage_without_data_and_a_sample_without_mask_are_named() -> None:
    with pytest.raises(ConfigError, match="has no data; build the data set there too"):
        AttachedLet._next_sample(None)
    with pytest.raises(ConfigError, match="gives labels, tokens and no loss_mask"):
        AttachedLet._next_sample(iter([{"tokens": torch.zeros(1, 2), "labels": torch.zeros(1, 2)}]))


def test_the_teacher_pulls_in_what_is_compared(pool: RankPool, base: dict[str, Any]) -> None:
    """Without the teacher's pull the gradients differ, so that the comparison above shows something."""
    plain = {flag: False for flag in base if flag.startswith("--let-")}
    with_let = pool.run(1, our_course, arguments(base))[0][0]
    without = pool.run(1, our_course, arguments(base, plain))[0][0]
    assert different(with_let.gradients[0], without.gradients[0]) != []
