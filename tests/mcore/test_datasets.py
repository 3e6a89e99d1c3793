"""The order of the data: no data-parallel size and no resume changes it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.config.derive import resolve
from megatron_let.mcore.datasets import (
    MicrobatchSampler,
    SampleCounts,
    build_datasets,
    data_prefixes,
    microbatches,
)
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.testing.training import TINY_STUDENT, arguments, write_token_files
from megatron_let.training.arguments import parse_arguments


def indices(num_samples: int, consumed: int, micro: int, dp_size: int) -> list[list[list[int]]]:
    """Return for each data-parallel rank its microbatches of sample indices."""
    ranks = []
    for rank in range(dp_size):
        sampler = MicrobatchSampler(
            num_samples, consumed_samples=consumed, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size
        )
        batches = list(sampler)
        assert len(sampler) == len(batches)
        ranks.append(batches)
    return ranks


@settings(max_examples=200, deadline=None)
@given(
    num_samples=st.integers(0, 200),
    micro=st.integers(1, 5),
    dp_size=st.sampled_from([1, 2, 4, 8]),
    consumed=st.integers(0, 220),
)
def test_the_ranks_together_read_on_in_order_and_miss_nothing(
    num_samples: int, micro: int, dp_size: int, consumed: int
) -> None:
    ranks = indices(num_samples, consumed, micro, dp_size)
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes as many steps"
    dealt = [index for step in zip(*ranks, strict=True) for batch in step for index in batch]
    whole_steps = max(0, num_samples - consumed) // (micro * dp_size)
    assert dealt == list(range(consumed, consumed + whole_steps * micro * dp_size))


@settings(max_examples=50, deadline=None)
@given(micro=st.sampled_from([1, 2, 4]), dp_sizes=st.permutations([1, 2, 4]), stop=st.integers(0, 8))
def test_a_global_batch_holds_the_same_samples_on_every_layout_and_after_a_resume(
    micro: int, dp_sizes: list[int], stop: int
) -> None:
    global_batch, iterations = 16, 8
    first, second = dp_sizes[:2]

    def batches(dp_size: int, start: int, end: int) -> list[set[int]]:
        ranks = indices(global_batch * iterations, start * global_batch, micro, dp_size)
        steps = global_batch // (micro * dp_size)
        return [
            {i for rank in ranks for step in rank[n * steps : (n + 1) * steps] for i in step}
            for n in range(end - start)
        ]

    expected = [set(range(n * global_batch, (n + 1) * global_batch)) for n in range(iterations)]
    assert batches(first, 0, iterations) == expected
    assert batches(first, 0, stop) + batches(second, stop, iterations) == expected


@dataclass
class Tokenizer:
    """What the data sets ask of a tokenizer."""

    vocab_size: int = 61
    eod: int = 60
    unique_identifiers: OrderedDict[str, Any] = field(
        default_factory=lambda: OrderedDict(name="test", vocab_size=61)
    )


def config_of(prefix: Any, **flags: Any) -> Any:
    changes = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    words = arguments(TINY_STUDENT, {"--data-path": prefix, "--micro-batch-size": 2, **changes})
    return resolve(parse_arguments(words), 1)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of documents whose tokens count upwards, so that a sequence shows where it came from."""
    path = tmp_path_factory.mktemp("tokens") / "counting"
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (40,), generator=random).tolist()
    write_token_files(path, [[*((i * 7 + torch.arange(n)) % 60).tolist(), 60] for i, n in enumerate(lengths)])
    return path


def test_labels_are_the_next_tokens_and_nothing_is_padding(
    prefix: Path, one_process: ParallelContext
) -> None:
    config = config_of(prefix)
    train = build_datasets(config, Tokenizer(), SampleCounts(train=40, valid=0, test=0), one_process).train
    assert len(train) >= 40  # type: ignore[arg-type]
    for index in range(40):
        tokens, labels = train[index]["tokens"], train[index]["labels"]
        assert tokens.shape == labels.shape == (32,)
        assert torch.equal(tokens[1:], labels[:-1])
        assert bool((train[index]["loss_mask"] == 1).all())


def test_microbatches_hold_tokens_and_labels_of_this_ranks_samples(
    prefix: Path, one_process: ParallelContext
) -> None:
    config = config_of(prefix)
    train = build_datasets(config, Tokenizer(), SampleCounts(train=40, valid=0, test=0), one_process).train
    second_of_two = dataclasses.replace(one_process, dp_rank=1, dp_size=2)
    batch = next(microbatches(train, config, second_of_two, consumed_samples=8))
    assert batch.keys() == {"tokens", "labels"}
    for row, index in enumerate((10, 11)):
        assert torch.equal(batch["tokens"][row], train[index]["tokens"])
        assert torch.equal(batch["labels"][row], train[index]["labels"])


def test_the_same_seed_gives_the_same_order_and_another_seed_another(
    prefix: Path, one_process: ParallelContext, tmp_path: Path
) -> None:
    def order(seed: int, cache: str) -> torch.Tensor:
        config = config_of(prefix, seed=seed, data_cache_path=tmp_path / cache)
        train = build_datasets(
            config, Tokenizer(), SampleCounts(train=20, valid=0, test=0), one_process
        ).train
        return torch.stack([train[i]["tokens"] for i in range(20)])

    assert torch.equal(order(1, "a"), order(1, "b"))
    assert not torch.equal(order(1, "a"), order(2, "a"))


def test_splits_are_built_where_they_are_asked_for(prefix: Path, one_process: ParallelContext) -> None:
    splits = build_datasets(
        config_of(prefix, split="80,20,0"), Tokenizer(), SampleCounts(train=10, valid=4, test=0), one_process
    )
    assert len(splits.train) >= 10  # type: ignore[arg-type]
    assert splits.valid is not None
    assert len(splits.valid) >= 4  # type: ignore[arg-type]
    assert splits.test is None


def test_prefixes_leave_out_weights_and_repeats() -> None:
    words = {
        "--data-path": False,
        "--train-data-path": ["0.3", "a", "0.7", "b"],
        "--valid-data-path": ["b"],
        "--test-data-path": ["c"],
    }
    config = parse_arguments(arguments(TINY_STUDENT, words))
    assert data_prefixes(config) == ["a", "b", "c"]
    assert data_prefixes(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None}))) == []
