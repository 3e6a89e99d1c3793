"""Training data: megatron-core's blended GPT datasets, read in an order that no data-parallel size changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.mcore.parallel import ParallelContext

Sample = dict[str, torch.Tensor]


class DataTokenizer(Protocol):
    """What the dataset needs to know of a tokenizer."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """Return what tells this tokenizer from others, for the name of cached indices."""


@dataclass(frozen=True)
class _CoreTokenizer:
    """The tokenizer as megatron-core's dataset reads it.

    Pretraining sequences hold no padding, so no id is one: `pad` is an id that never occurs. (With a real id,
    megatron-core would mask every such token out of the loss.)
    """

    vocab_size: int
    eod: int
    unique_identifiers: OrderedDict[str, Any]
    pad: int = -1

    @property
    def special_tokens_dict(self) -> dict[str, int]:
        return {}


@dataclass(frozen=True)
class DataSplits:
    """The three splits; one is None when it was not asked for or holds no data."""

    train: Dataset[Sample]
    valid: Dataset[Sample] | None
    test: Dataset[Sample] | None


@dataclass(frozen=True)
class SampleCounts:
    """How many samples each split must provide."""

    train: int
    valid: int
    test: int


def build_datasets(config: RunConfig, tokenizer: DataTokenizer, counts: SampleCounts) -> DataSplits:
    """Build (or take from the cache) the sample indices of every split; all ranks call this together.

    Raises:
        ConfigError: the blend or the split string is malformed, or the training split is empty.
    """
    try:
        core = _core_config(config, tokenizer)
        dataset_type = MockGPTDataset if config.data.mock_data else GPTDataset
        sizes = [counts.train, counts.valid or None, counts.test or None]
        train, valid, test = BlendedMegatronDatasetBuilder(dataset_type, sizes, lambda: True, core).build()
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"the training data cannot be used: {' '.join(str(error).split())}") from error
    if train is None or len(train) == 0:
        raise ConfigError("the training split holds no sample; check --data-path and --split")
    return DataSplits(train, valid, test)


def _core_config(config: RunConfig, tokenizer: DataTokenizer) -> GPTDatasetConfig:
    data = config.data
    per_split = [data.train_data_path, data.valid_data_path, data.test_data_path]
    has_per_split = any(per_split)
    return GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.model.seq_length,
        blend=get_blend_from_list(list(data.data_path)) if data.data_path else None,
        blend_per_split=[get_blend_from_list(list(paths)) if paths else None for paths in per_split]
        if has_per_split
        else None,
        split=None if has_per_split else data.split,
        num_dataset_builder_threads=data.num_dataset_builder_threads,
        path_to_cache=data.data_cache_path,
        mmap_bin_files=data.mmap_bin_files,
        tokenizer=_CoreTokenizer(tokenizer.vocab_size, tokenizer.eod, tokenizer.unique_identifiers),
        # Masks and positions are made per microbatch on the device (batch.py), not per sample in the loader.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def splits_without_documents(split: str, num_sequences: int, counts: SampleCounts) -> list[str]:
    """Return the splits that must give samples but get none of the `num_sequences` sequences of a data set.

    megatron-core deals sequences to splits by rounded shares, and looks for ever for samples in an empty one.
    """
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    wanted = {"training": counts.train, "validation": counts.valid, "test": counts.test}
    return [
        name
        for (name, count), share in zip(wanted.items(), shares, strict=True)
        if count and share is not None and round(share[0] * num_sequences) == round(share[1] * num_sequences)
    ]


def data_prefixes(config: RunConfig) -> list[str]:
    """Return the prefix of every data set of the run, blend weights left out, each once."""
    data = config.data
    prefixes: list[str] = []
    for paths in (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path):
        if paths:
            blend = get_blend_from_list(list(paths))
            prefixes.extend(blend[0] if blend else [])
    return list(dict.fromkeys(prefixes))


class MicrobatchSampler(Sampler[list[int]]):
    """Sample indices of one data-parallel rank, microbatch by microbatch, from a given number of consumed samples.

    Samples are dealt in order: `micro_batch_size` to each data-parallel rank in turn. A global batch therefore
    holds the same samples for every data-parallel size, and a resume continues exactly where the run stopped.
    """

    def __init__(
        self, num_samples: int, *, consumed_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        self.num_samples = num_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.first = dp_rank * micro_batch_size
        self.stride = dp_size * micro_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.consumed_samples, self.num_samples - self.stride + 1, self.stride):
            mine = start + self.first
            yield list(range(mine, mine + self.micro_batch_size))

    def __len__(self) -> int:
        return max(0, (self.num_samples - self.consumed_samples) // self.stride)


def _collate(samples: Sequence[Sample]) -> Sample:
    # Only the ids travel; everything else follows from them.
    return {key: torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels")}


def microbatches(
    dataset: Dataset[Sample], config: RunConfig, context: ParallelContext, *, consumed_samples: int
) -> Iterator[Sample]:
    """Iterate over this rank's microbatches: `tokens` and `labels` [micro_batch_size, seq_length] each.

    Every tensor-parallel rank reads for itself from the memory-mapped file: no broadcast is needed.
    """
    sampler = MicrobatchSampler(
        len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed_samples,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
    )
    workers = config.data.num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=context.is_on_gpu,
        persistent_workers=workers > 0,
        # A loader draws a seed when iteration starts; from its own generator, so that the run's stays untouched.
        generator=torch.Generator(),
    )
    return iter(loader)
