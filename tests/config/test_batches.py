"""Batch, rank and vocabulary arithmetic is Megatron-LM's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_let.config.batches import (
    BatchPlan,
    batch_plan,
    data_parallel_size,
    padded_vocab_size,
    train_iterations,
)
from megatron_let.config.run_config import RunConfig

Parse = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("size", "divisible_by", "tensor", "expected"),
    [(50257, 128, 1, 50304), (50257, 128, 8, 51200), (50304, 128, 1, 50304), (1, 1, 1, 1), (101, 1, 2, 102)],
)
def test_the_vocabulary_is_padded_to_a_multiple_for_all_tensor_ranks(
    size: int, divisible_by: int, tensor: int, expected: int
) -> None:
    assert padded_vocab_size(size, divisible_by, tensor) == expected


def test_data_parallel_ranks_are_what_a_replica_leaves(parse: Parse) -> None:
    config = parse(
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2"
    )
    assert data_parallel_size(config, 32) == 4


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 12),
    start=st.integers(1, 6),
    increment=st.integers(1, 6),
    ramp=st.integers(1, 500),
    consumed=st.integers(0, 700),
)
def test_ramp_up_gives_the_batches_of_megatron_core(
    steps: int, start: int, increment: int, ramp: int, consumed: int
) -> None:
    full = start + steps * increment
    core = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 1, start, increment, ramp)
    core.update(consumed, consistency_check=False)
    plan = BatchPlan(1, 1, full, (start, increment, ramp))
    assert plan.global_batch_size(consumed) == core.get_current_global_batch_size()
    assert plan.num_microbatches(consumed) == core.get()


def iterations_in_megatron(plan: BatchPlan, samples: int, ramp: int) -> int:
    """Megatron-LM's rule, one iteration at a time: those that begin in the ramp, then whole batches only."""
    iterations, consumed = 0, 0
    while consumed <= min(ramp, samples):
        consumed, iterations = consumed + plan.global_batch_size(consumed), iterations + 1
    while consumed + plan.full <= samples:
        consumed, iterations = consumed + plan.full, iterations + 1
    return iterations


@pytest.mark.parametrize("samples", [1, 15, 16, 30, 99, 100, 101, 104, 120, 1000, 1031, 1032])
def test_iterations_of_a_run_counted_in_samples(samples: int) -> None:
    """Megatron-LM's count, but for the iteration that would read beyond the last sample while the batch still grows."""
    assert BatchPlan(4, 2, 32).iterations_of_samples(samples) == samples // 32
    plan = BatchPlan(4, 2, 32, (8, 8, 100))
    theirs = iterations_in_megatron(plan, samples, 100)
    is_too_many = plan.samples_of_iterations(theirs) > samples
    assert plan.iterations_of_samples(samples) == theirs - is_too_many
    assert is_too_many == (samples < 120)


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(0, 300), ramp=st.integers(0, 200), steps=st.integers(0, 5))
def test_no_more_samples_are_read_than_there_are_and_no_whole_batch_is_left(
    samples: int, ramp: int, steps: int
) -> None:
    plan = BatchPlan(1, 1, 2 + 2 * steps, (2, 2, ramp))
    count = plan.iterations_of_samples(samples)
    assert plan.samples_of_iterations(count) <= samples < plan.samples_of_iterations(count + 1)


@pytest.mark.parametrize("rampup", [None, (8, 8, 100), (32, 8, 0)])
def test_samples_of_iterations_add_up_the_batches(rampup: tuple[int, int, int] | None) -> None:
    plan = BatchPlan(4, 2, 32, rampup)
    consumed = 0
    for iteration in range(30):
        assert plan.samples_of_iterations(iteration) == consumed
        consumed += plan.global_batch_size(consumed)


def test_the_length_of_a_run_comes_from_iterations_or_samples(parse: Parse) -> None:
    assert train_iterations(parse(), 4) == 100
    by_samples = parse("--train-samples 1000 --global-batch-size 32", without="--train-iters 100")
    assert train_iterations(by_samples, 4) == 31


def test_a_run_without_a_global_batch_has_one_microbatch_a_replica(parse: Parse) -> None:
    plan = batch_plan(parse(), 4)
    assert (plan.full, plan.num_microbatches(0)) == (8, 1)


def test_what_is_left_of_a_ramp_up_is_counted_from_any_iteration() -> None:
    plan = BatchPlan(1, 1, 32, (1, 1, 300))
    total, consumed = 60, 0
    whole = plan.samples_of_iterations(total)
    for done in range(total):
        assert plan.samples_of_iterations(total - done, consumed) == whole
        consumed += plan.global_batch_size(consumed)
