"""Build the index cache of a run before the run: its data checks and its indexing, on one process, without a model."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_let.config.batches import model_parallel_size, train_iterations
from megatron_let.config.checks.rules import Packages
from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.datasets import (
    build_datasets_alone,
    cache_directories,
    data_use,
    is_any_blend,
    split_parts,
)
from megatron_let.training.data_checks import data_warnings
from megatron_let.training.data_needs import build_run_tokenizer, sample_counts
from megatron_let.training.split_checks import usable_counts_alone
from megatron_let.training.state import TrainingState

# The run's kernels need not be here: the data do not ask for them.
_ANYWHERE = Packages(transformer_engine=True, apex=True)


def build_data_cache(config: RunConfig, world_size: int | None) -> list[str]:
    """Build what a run with these settings will find in its cache; return what was built, in lines for people.

    `world_size` counts only without --global-batch-size, which then follows from it.

    Raises:
        ConfigError: as the run itself would raise it; or there is nothing to build.
    """
    if config.data.mock_data:
        raise ConfigError("--mock-data needs no cache: made-up data are indexed in a moment")
    if world_size is None and config.training.global_batch_size is None:
        raise ConfigError(
            "without --global-batch-size the number of samples depends on the ranks of the run: give --world-size too"
        )
    if world_size is not None and world_size < 1:
        raise ConfigError(f"--world-size {world_size}: a run has at least one rank")
    world_size = world_size or model_parallel_size(config)
    config = resolve(config, world_size, _ANYWHERE)
    tokenizer = build_run_tokenizer(config)
    for warning in data_warnings(config, tokenizer, needs_teacher=False):
        LOGGER.warning(warning)
    if config.data.data_cache_path is None and is_any_blend(config):
        LOGGER.warning("without --data-cache-path the order of a blend is not kept: the run builds it anew")
    counts = usable_counts_alone(
        config, sample_counts(config, train_iterations(config, world_size), TrainingState())
    )
    splits = build_datasets_alone(config, tokenizer, counts)
    lines: list[str] = []
    for name, dataset, count in (
        ("training", splits.train, counts.train),
        ("validation", splits.valid, counts.valid),
        ("test", splits.test, counts.test),
    ):
        lines += _about_split(config, name, dataset, count) if count else [f"{name}: no samples"]
    return [*lines, f"cache: {', '.join(cache_directories(config))}"]


def _about_split(config: RunConfig, name: str, dataset: object, count: int) -> Iterator[str]:
    length = config.model.seq_length
    yield f"{name}: {count:,} samples of {length:,} tokens"
    for use in data_use(dataset, split_parts(config)[name], count):
        epochs = use.samples * length / use.tokens
        yield f"  {use.prefix}: {use.samples:,} samples, {epochs:.2f} epochs of {use.tokens:,} tokens"
