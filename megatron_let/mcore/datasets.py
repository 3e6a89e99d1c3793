"""Training data: megatron-core's blended GPT datasets, read in an order that no data-parallel size changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_let.config.run_config import RunConfig
from megatron_let.data.indexed import count_tokens
from megatron_let.errors import ConfigError
from megatron_let.lifetime import leave_signals_to_parent
from megatron_let.mcore.index_cache import (
    CachedBlendedDataset,
    CachedDatasetBuilder,
    CachedGPTDataset,
    default_cache,
    require_unchanged,
)
from megatron_let.mcore.loading import LoadedMicrobatches, Sample, require_shared_memory
from megatron_let.mcore.parallel import ParallelContext


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
    """How many samples each split must provide; a split of 0 is not built."""

    train: int
    valid: int
    test: int


class SplitPart(NamedTuple):
    """What one split reads of one data set: its sequences between two shares of their number."""

    prefix: str
    begin: float
    end: float


def split_parts(config: RunConfig) -> dict[str, list[SplitPart]]:
    """Return what training, validation and test read of each data set; nothing for made-up data."""
    data = config.data
    parts: dict[str, list[SplitPart]] = {"training": [], "validation": [], "test": []}
    if data.data_path:
        shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(str(data.split)))
        for split, bounds in zip(parts, shares, strict=True):
            if bounds is not None:
                parts[split] = [SplitPart(prefix, *bounds) for prefix in _prefixes(data.data_path)]
        return parts
    for split, paths in zip(parts, _paths_per_split(config), strict=True):
        parts[split] = [SplitPart(prefix, 0.0, 1.0) for prefix in _prefixes(paths)]
    return parts


def is_blended_by_size(config: RunConfig, split: str) -> bool:
    """Return whether `split` joins several data sets without weights: each is then read once and not repeated."""
    return len(split_parts(config)[split]) > 1 and blend_weights(config, split) is None


def is_any_blend(config: RunConfig) -> bool:
    """Return whether a split joins several data sets."""
    return any(len(parts) > 1 for parts in split_parts(config).values())


class DataUse(NamedTuple):
    """What a split takes of one data set."""

    prefix: str
    samples: int
    tokens: int
    """Of one epoch: the data set's share in this split."""


def data_use(dataset: Any, parts: Sequence[SplitPart], count: int) -> list[DataUse]:
    """Return what the first `count` samples of a built split take of each data set; `parts` as split_parts gives them."""
    taken = [count]
    if isinstance(dataset, CachedBlendedDataset):
        taken = np.bincount(dataset.dataset_index[:count], minlength=len(parts)).tolist()
    return [
        DataUse(part.prefix, samples, count_tokens(*part)) for part, samples in zip(parts, taken, strict=True)
    ]


def blend_weights(config: RunConfig, split: str) -> list[float] | None:
    """Return the weights of a split's blend, None where its data sets are joined by size."""
    per_split = dict(zip(("training", "validation", "test"), _paths_per_split(config), strict=True))
    paths = config.data.data_path or per_split[split]
    blend = get_blend_from_list(list(paths)) if paths else None
    return None if blend is None or blend[1] is None else list(blend[1])


def sample_origin(dataset: Any, number: int) -> tuple[int, int, int]:
    """Return where sample `number` of a built split begins: data set of the blend, document, token in the document."""
    which, index = 0, number
    if isinstance(dataset, CachedBlendedDataset):
        which, index = int(dataset.dataset_index[number]), int(dataset.dataset_sample_index[number])
        dataset = dataset.datasets[which]
    position, offset = dataset.sample_index[dataset.shuffle_index[index]]
    return which, int(dataset.document_index[position]), int(offset)


def build_datasets(
    config: RunConfig, tokenizer: DataTokenizer, counts: SampleCounts, context: ParallelContext
) -> DataSplits:
    """Build (or take from the cache) the sample indices of every split; all ranks call this together.

    Raises:
        ConfigError: the data cannot be indexed, or give fewer samples than asked for; too little shared memory to load them.
    """
    context.together(lambda: require_shared_memory(config))
    # Rank 0 first, then one rank of each node, then the others: each finds the indices in the cache, or builds them where its
    # node does not share that directory. megatron-core's builder would hold them at a barrier that a failure never reaches.
    turn = 0 if context.rank == 0 else 1 if context.local_rank == 0 else 2

    def build() -> list[DataSplits]:
        return [build_datasets_alone(config, tokenizer, counts)]

    built: list[DataSplits] = []
    for now in range(3):
        built += context.together(build if turn == now else list)
    return built[0]


def build_datasets_alone(config: RunConfig, tokenizer: DataTokenizer, counts: SampleCounts) -> DataSplits:
    """Do the same on this process, whatever others do.

    Raises:
        ConfigError: as build_datasets.
    """
    with patch.object(dist, "is_initialized", lambda: False), patch.object(dist, "get_rank", lambda: 0):
        train, valid, test = _build_splits(config, tokenizer, counts)
    for name, dataset, count in (
        ("training", train, counts.train),
        ("validation", valid, counts.valid),
        ("test", test, counts.test),
    ):
        found = 0 if dataset is None else len(dataset)
        if found < count:
            raise ConfigError(f"the {name} data give {found} samples, and {count} are needed; give more data")
    return DataSplits(train, valid, test)


def _build_splits(config: RunConfig, tokenizer: DataTokenizer, counts: SampleCounts) -> list[Any]:
    core = _core_config(config, tokenizer)
    sizes = [counts.train, counts.valid, counts.test]
    for index, size in enumerate(sizes):
        if size == 0 and core.blend_per_split is not None:
            core.blend_per_split[index] = None
        elif size == 0:
            core.split_matrix[index] = None
    dataset_type = MockGPTDataset if config.data.mock_data else CachedGPTDataset
    try:
        return list(CachedDatasetBuilder(dataset_type, sizes, lambda: True, core).build())
    except (AssertionError, ValueError, IndexError, MemoryError) as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ConfigError(
            f"the samples of {', '.join(data_prefixes(config)) or 'the mock data'} cannot be indexed: {reason}; check "
            "--data-path and the length of the run"
        ) from problem


def _core_config(config: RunConfig, tokenizer: DataTokenizer) -> GPTDatasetConfig:
    data = config.data
    per_split = _paths_per_split(config)
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
        # Made-up data are indexed in a moment.
        path_to_cache=None if data.mock_data else data.data_cache_path,
        mmap_bin_files=data.mmap_bin_files,
        tokenizer=_CoreTokenizer(tokenizer.vocab_size, tokenizer.eod, tokenizer.unique_identifiers),
        # Masks and positions are made per microbatch on the device (batch.py), not per sample in the loader.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _paths_per_split(config: RunConfig) -> list[tuple[str, ...] | None]:
    data = config.data
    return [data.train_data_path, data.valid_data_path, data.test_data_path]


def _prefixes(paths: Sequence[str] | None) -> list[str]:
    """Return the prefixes of a blend, weights left out."""
    blend = get_blend_from_list(list(paths)) if paths else None
    return list(blend[0]) if blend else []


def cache_directories(config: RunConfig) -> list[str]:
    """Return where the sample indices of a run are kept."""
    place = config.data.data_cache_path
    return [default_cache(prefix) for prefix in data_prefixes(config)] if place is None else [place]


def data_prefixes(config: RunConfig) -> list[str]:
    """Return the prefix of every data set of the run, blend weights left out, each once."""
    given = (config.data.data_path, *_paths_per_split(config))
    return list(dict.fromkeys(prefix for paths in given for prefix in _prefixes(paths)))


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


def _begin_worker(_: int) -> None:
    leave_signals_to_parent()


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
        worker_init_fn=_begin_worker,
        # A loader draws a seed when iteration starts; from its own generator, so that the run's stays untouched.
        generator=torch.Generator(),
    )
    return LoadedMicrobatches(loader, rank=context.rank, require_data=lambda: require_unchanged(dataset))
