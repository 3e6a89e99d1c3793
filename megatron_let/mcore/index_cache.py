"""The cache of sample indices: named after the data they belong to, put there whole, looked over when taken.

megatron-core names cached indices by the data's path, not by what lies there, writes them in place and takes whatever
bears the name. Here the name also holds the data's identity; files are made in a directory of their own and renamed;
and an index that does not fit its data set is built again. Source of what is built: gpt_dataset.py and
blended_dataset.py of megatron.core.datasets.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_let.data.identity import data_identity
from megatron_let.data.unchanged import state_of_pair
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER

_CHUNK = 1 << 20


def default_cache(prefix: str) -> str:
    """Return the directory beside the data of `prefix` where megatron-core keeps their indices."""
    return os.path.join(prefix, "cache", "GPTDataset_indices")


class CachedGPTDataset(GPTDataset):
    """A data set whose cached indices are its own."""

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str,
        indexed_indices: Any,
        num_samples: int | None,
        index_split: Any,
        config: Any,
    ) -> None:
        # The tokenizer's identifiers are hashed into the name of the cache, and from there into that of a blend's.
        known = config.tokenizer.unique_identifiers
        identifiers = OrderedDict([*known.items(), ("data", data_identity(dataset_path))])
        config = copy.copy(config)
        config.tokenizer = replace(config.tokenizer, unique_identifiers=identifiers)
        self._files = state_of_pair(dataset_path)
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)

    def __getitem__(self, idx: int | None) -> Any:
        """Return a sample of files that are what they were.

        Raises:
            ConfigError: they were changed since the data set was built.
        """
        self.require_unchanged()  # reading what was cut off would end this program
        sample = super().__getitem__(idx)
        self.require_unchanged()
        return sample

    def require_unchanged(self) -> None:
        """Raise ConfigError when the files were changed since the data set was built."""
        self._files = self._files.require_unchanged()

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, ...]:
        directory = self.config.path_to_cache
        if directory is None:
            directory = default_cache(self.dataset.path_prefix)
        return _through_cache(
            self,
            directory,
            base=f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}",
            kinds=("document_index", "sample_index", "shuffle_index"),
            build=super()._build_document_sample_shuffle_indices,
            problem_of=self._problem_of,
        )

    def _problem_of(self, document_index: Any, sample_index: Any, shuffle_index: Any) -> str | None:
        """Return why these indices cannot be this data set's, None when they can.

        document_index: [documents of all epochs]. sample_index: [samples + 1, 2], position in document_index and
        offset in that document. shuffle_index: [samples], a permutation.
        """
        if document_index.ndim != 1 or sample_index.ndim != 2 or shuffle_index.ndim != 1:
            return "wrong shapes"
        if any(index.dtype.kind not in "iu" for index in (document_index, sample_index, shuffle_index)):
            return "no integers"
        samples, documents = len(shuffle_index), len(self.indices)
        if sample_index.shape != (samples + 1, 2) or samples < (self.num_samples or 0):
            return f"{sample_index.shape[0] - 1} samples in one file, {samples} in another"
        if not documents or not len(document_index) or len(document_index) % documents:
            return f"{len(document_index)} documents are no whole epochs of {documents}"
        if document_index.min() < self.indices[0] or document_index.max() > self.indices[-1]:
            return "documents out of range"
        epochs = len(document_index) // documents
        if _sum(document_index) != epochs * _sum(self.indices):
            return "not every document as often as the others"
        if not _is_rising(sample_index, limit=len(document_index)):
            return "samples out of order"
        if samples and (shuffle_index.max() >= samples or _sum(shuffle_index) != _sum_below(samples)):
            return "not every sample once"
        return None


class CachedBlendedDataset(BlendedDataset):
    """A blend of data sets whose cached indices are its own; without `path_to_cache` they are kept in memory."""

    def _build_indices(self) -> tuple[Any, ...]:
        if self.config.path_to_cache is None:
            indices: tuple[Any, ...] = super()._build_indices()
            return indices
        return _through_cache(
            self,
            self.config.path_to_cache,
            base=f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}",
            kinds=("dataset_index", "dataset_sample_index"),
            build=super()._build_indices,
            problem_of=self._problem_of,
        )

    def _problem_of(self, dataset_index: Any, dataset_sample_index: Any) -> str | None:
        """Return why these indices cannot be this blend's, None when they can; both are [samples]."""
        size = sum(self.weights) if self.size is None else self.size
        if dataset_index.shape != (size,) or dataset_sample_index.shape != (size,):
            return f"{dataset_index.shape} and {dataset_sample_index.shape} instead of {size} samples"
        if any(index.dtype.kind not in "iu" for index in (dataset_index, dataset_sample_index)):
            return "no integers"
        lengths = np.array([len(dataset) for dataset in self.datasets])
        taken = np.zeros(len(lengths), dtype=np.int64)
        for first in range(0, size, _CHUNK):
            which = dataset_index[first : first + _CHUNK]
            sample = dataset_sample_index[first : first + _CHUNK]
            if which.min() < 0 or which.max() >= len(lengths):
                return "data sets out of range"
            if sample.min() < 0 or (sample >= lengths[which]).any():
                return "samples out of range"
            taken += np.bincount(which, minlength=len(lengths))
        if _sum(dataset_sample_index) != sum(_sum_below(int(count)) for count in taken):
            return "samples of a data set left out or repeated"
        return None


def require_unchanged(dataset: Any) -> None:
    """Raise ConfigError when a file of a data set or blend was changed since it was built; made-up data have none."""
    for part in getattr(dataset, "datasets", [dataset]):
        if isinstance(part, CachedGPTDataset):
            part.require_unchanged()


class CachedDatasetBuilder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder, with our blend in place of its own. For one process alone: no rank waits for another."""

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        """Build one data set or blend."""
        return CachedBlendedDataset(*args) if cls is BlendedDataset else cls(*args)


def _through_cache(
    dataset: Any,
    directory: str,
    *,
    base: str,
    kinds: Sequence[str],
    build: Callable[[], Any],
    problem_of: Callable[..., str | None],
) -> tuple[Any, ...]:
    """Return the indices of a data set, mapped from the cache; what is missing or does not fit is built first.

    Raises:
        ConfigError: the directory cannot be written to.
    """
    arrays = [os.path.join(directory, f"{base}-{kind}.npy") for kind in kinds]
    paths = [*arrays, os.path.join(directory, f"{base}-description.txt")]
    if all(map(os.path.isfile, paths)):
        try:
            found = _load(arrays)
            problem = problem_of(*found)
        except Exception as error:  # what numpy raises over a damaged file depends on where it is damaged
            problem = " ".join(str(error).split()) or type(error).__name__
        if problem is None:
            return found
        LOGGER.warning(
            f"the cached sample index {arrays[0]} and its like are damaged ({problem}): built again"
        )
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as place:
            _build_in(dataset, place, build)
            # The description goes last: all files of a set are there only when each is whole.
            for path in paths:
                _put(os.path.join(place, os.path.basename(path)), path)
        return _load(arrays)
    except OSError as problem:
        raise ConfigError(
            f"the index of the samples cannot be kept in {directory}: {problem.strerror or problem}; give a writable "
            "directory with --data-cache-path"
        ) from problem


def _build_in(dataset: Any, directory: str, build: Callable[[], Any]) -> None:
    """Have megatron-core build and save the indices of a data set in an empty directory."""
    config = dataset.config
    dataset.config = copy.copy(config)
    dataset.config.path_to_cache = directory
    try:
        build()
    finally:
        dataset.config = config


def _put(source: str, target: str) -> None:
    """Rename a file whose content has reached the disk."""
    with open(source, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(source, target)


def _load(paths: Sequence[str]) -> tuple[Any, ...]:
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def _sum(values: Any) -> int:
    return int(values.sum(dtype=np.int64))


def _sum_below(count: int) -> int:
    """Return 0 + 1 + ... + (count - 1)."""
    return count * (count - 1) // 2


def _is_rising(sample_index: Any, *, limit: int) -> bool:
    """Return whether each (document, offset) of [n, 2] comes after the one before it, documents in 0..limit-1."""
    for first in range(0, len(sample_index), _CHUNK):
        some = sample_index[first : first + _CHUNK + 1]
        if some.min() < 0 or some[-1, 0] >= limit:
            return False
        steps = np.diff(some, axis=0)
        if not ((steps[:, 0] > 0) | ((steps[:, 0] == 0) & (steps[:, 1] > 0))).all():
            return False
    return True
