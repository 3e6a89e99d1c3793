"""Every kind of optimizer state is resumed bitwise, or refused in one line that names the flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_let.errors import EXIT_DONE, EXIT_PREEMPTED
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import (
    TINY_STUDENT,
    arguments,
    assert_bitwise,
    numbers,
    refusal,
    stored_tensors,
    train,
    training_rows,
)

SGD = {"--optimizer": "sgd"}
DISTRIBUTED = {"--use-distributed-optimizer": None}
FALLING = {"--fp16": None, "--initial-loss-scale": 2**40}
"""Loss scaling that overflows in all iterations of these runs: the optimizer makes no step."""

KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "sgd": (1, SGD),
    "sgd-bf16": (1, {**SGD, "--bf16": None}),
    "sgd-without-momentum": (1, {**SGD, "--sgd-momentum": 0}),
    "sgd-before-the-first-step": (1, {**SGD, **FALLING}),
    "adam-before-the-first-step": (1, FALLING),
    "distributed-before-the-first-step": (2, {**FALLING, **DISTRIBUTED}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_bitwise(
    kind: str, token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    world_size, flags = KINDS[kind]
    base = {"--data-path": token_files, "--train-iters": 4, **flags}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cut = {**base, "--save": parts, "--load": parts, "--exit-interval": 2}

    def run(changes: dict[str, Any]) -> int:
        return pool.run(world_size, train, arguments(TINY_STUDENT, changes))[0]

    assert run({**base, "--save": whole}) == EXIT_DONE
    assert run(cut) == EXIT_PREEMPTED
    assert run({**cut, "--exit-interval": False}) == EXIT_DONE
    assert numbers(parts) == numbers(whole)
    assert_bitwise(parts, whole, 4)
    skipped = 4 if "--fp16" in flags else 0
    assert training_rows(parts)[-1]["skipped_iterations"] == skipped
    has_momentum = any(".momentum_buffer." in name for name in stored_tensors(parts / "iter_0000002"))
    assert has_momentum == ("--optimizer" in flags and "--sgd-momentum" not in flags)


def test_the_first_good_step_may_come_after_the_resume(
    token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    """The scale falls for some iterations, the run is cut in between, and then trains."""
    falls = {"--fp16": None, "--initial-loss-scale": 2**24, "--hysteresis": 1, "--train-iters": 12}
    base = {"--data-path": token_files, **falls}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    cut = {**base, "--save": parts, "--load": parts, "--exit-interval": 2}
    for changes in ({**base, "--save": whole}, cut, {**cut, "--exit-interval": False}):
        pool.run(1, train, arguments(TINY_STUDENT, changes))
    assert 2 < training_rows(parts)[-1]["skipped_iterations"] < 12
    assert numbers(parts) == numbers(whole)
    assert_bitwise(parts, whole, 12)


FORMS: dict[str, dict[str, Any]] = {
    "--optimizer adam, fp32": {},
    "--optimizer adam, --bf16 or --fp16": {"--bf16": None},
    "--optimizer adam, --use-distributed-optimizer": DISTRIBUTED,
    "--optimizer sgd, fp32": SGD,
}


@pytest.mark.parametrize("saved", FORMS)
def test_another_form_of_optimizer_state_is_refused_by_its_flags(
    saved: str, token_files: Path, pool: RankPool, tmp_path: Path
) -> None:
    base = {"--data-path": token_files, "--train-iters": 1, "--load": tmp_path}
    first = {**base, "--load": False, "--save": tmp_path, **FORMS[saved]}
    pool.run(1, train, arguments(TINY_STUDENT, first))
    for form, flags in FORMS.items():
        if form == saved:
            continue
        resumed = {**base, "--train-iters": 2, **flags}
        assert pool.run(1, refusal, arguments(TINY_STUDENT, resumed)) == [
            f"checkpoint {tmp_path / 'iter_0000001'} holds the optimizer state of a run with {saved}, and this run has "
            f"{form}; give the same, or --no-load-optim to begin the optimizer anew"
        ]
        anew = arguments(TINY_STUDENT, {**resumed, "--no-load-optim": None})
        assert pool.run(1, train, anew) == [EXIT_DONE]
