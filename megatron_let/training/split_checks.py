"""Does each split hold what the run asks of it? megatron-core would count epochs of nothing for ever."""

from __future__ import annotations

from dataclasses import replace

from megatron_let.config.run_config import RunConfig
from megatron_let.data.indexed import count_tokens
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.datasets import SampleCounts, is_blended_by_size, split_parts
from megatron_let.mcore.parallel import ParallelContext


def usable_counts(config: RunConfig, counts: SampleCounts, context: ParallelContext) -> SampleCounts:
    """Return `counts` with 0 for a validation or test split that has no data; every rank calls this.

    One that was left empty on purpose (a share of 0, no path) is passed over in silence, one that is empty by accident
    gets a warning. It is an error for training, and for validation when `--eval-interval` or `--skip-train` asks for it.

    Raises:
        ConfigError: such a split is empty.
    """
    return context.on_rank_0(lambda: _usable_counts(config, counts))


def _usable_counts(config: RunConfig, counts: SampleCounts) -> SampleCounts:
    if config.data.mock_data:
        return counts
    problem = _problem(config, "training")
    if problem is not None:
        raise ConfigError(f"{problem}; give it more with --split, or other data")
    is_asked = config.validation.eval_interval is not None or config.validation.skip_train
    for split, name, is_needed in (("validation", "valid", is_asked), ("test", "test", False)):
        if getattr(counts, name) == 0:
            continue
        problem = _problem(config, split)
        if problem is not None and is_needed:
            raise ConfigError(
                f"{problem}; give it more with --split, or its own data with --valid-data-path (and --train-data-path), "
                "or leave validation out: --eval-iters 0"
            )
        if problem is not None:
            counts = replace(counts, **{name: 0})
            if split_parts(config)[split]:
                LOGGER.warning(f"{problem}; there will be no {split}")
    return counts


def _problem(config: RunConfig, split: str) -> str | None:
    """Return why `split` has no data, or None when every data set of its blend gives it some."""
    parts = split_parts(config)[split]
    path_flag = {
        "training": "--train-data-path",
        "validation": "--valid-data-path",
        "test": "--test-data-path",
    }[split]
    how = f"--split {config.data.split}" if config.data.data_path else path_flag
    if not parts:
        return f"there is no {split} data ({how if config.data.data_path else f'no {path_flag}'})"
    # A data set alone is repeated as often as needed; in a blend by size it must fill a sample by itself.
    needed = config.model.seq_length + 1 if is_blended_by_size(config, split) else 1
    for prefix, begin, end in parts:
        tokens = count_tokens(prefix, begin, end)
        if tokens < needed:
            what = "no token" if tokens == 0 else f"{tokens} tokens, less than one sequence of {needed}"
            return f"the {split} share of data set {prefix} holds {what} ({how})"
    return None
