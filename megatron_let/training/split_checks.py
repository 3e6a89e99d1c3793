"""Does each split hold what the run asks of it? megatron-core would count epochs of nothing for ever."""

from __future__ import annotations

from dataclasses import replace

from megatron_let.config.checks.rules import given
from megatron_let.config.run_config import RunConfig
from megatron_let.data.indexed import count_tokens
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.datasets import SampleCounts, is_blended_by_size, split_parts
from megatron_let.mcore.parallel import ParallelContext

_PATH_FLAGS = {
    "training": "--train-data-path",
    "validation": "--valid-data-path",
    "test": "--test-data-path",
}


def usable_counts(config: RunConfig, counts: SampleCounts, context: ParallelContext) -> SampleCounts:
    """Return `counts` with 0 for a validation or test split that lacks data; every rank calls this.

    One left empty on purpose (a share of 0, no path) is passed over in silence, one that lacks data by accident gets a
    warning. For training it is an error, and for validation when a flag asks for it.

    Raises:
        ConfigError: such a split holds too little.
    """
    return context.on_rank_0(lambda: usable_counts_alone(config, counts))


def usable_counts_alone(config: RunConfig, counts: SampleCounts) -> SampleCounts:
    """Do the same on this process alone.

    Raises:
        ConfigError: as usable_counts.
    """
    if config.data.mock_data:
        return counts
    problem = _problem(config, "training", counts.train)
    if problem is not None:
        raise ConfigError(f"{problem}; give more data or a larger share, or shorten the run")
    asks = given(config.validation, "eval_interval", "eval_iters", "skip_train")
    problem = _problem(config, "validation", counts.valid)
    if problem is not None and asks:
        raise ConfigError(
            f"{problem}, but {' '.join(asks)} asks for validation; give it a larger share or data of its own, or switch "
            "it off with --eval-iters 0"
        )
    if problem is not None:
        counts = replace(counts, valid=0)
        _warn(config, "validation", problem)
    problem = _problem(config, "test", counts.test)
    if problem is not None:
        counts = replace(counts, test=0)
        _warn(config, "test", problem)
    return counts


def _warn(config: RunConfig, split: str, problem: str) -> None:
    if split_parts(config)[split]:
        LOGGER.warning(f"{problem}; there will be no {split}")


def _problem(config: RunConfig, split: str, count: int) -> str | None:
    """Return why `split` cannot give `count` samples, or None when it can.

    A data set alone, or with a weight, is repeated as often as needed; in a blend by size each is read once.
    """
    if count == 0:
        return None
    parts, is_by_size = split_parts(config)[split], is_blended_by_size(config, split)
    flag = _PATH_FLAGS[split]
    source = f"--split {config.data.split}" if config.data.data_path else flag
    if not parts:
        return f"there is no {split} data ({source if config.data.data_path else f'no {flag}'})"
    length, samples = config.model.seq_length, 0
    for prefix, begin, end in parts:
        tokens = count_tokens(prefix, begin, end)
        if tokens == 0 or (is_by_size and tokens <= length):
            return f"the {split} share of data set {prefix} holds {tokens} tokens ({source}), less than one sample"
        samples += (tokens - 1) // length  # a sample's last label is the first token of the next
    if is_by_size and samples < count:
        return (
            f"the {split} data hold {samples} samples of {length} tokens ({source}), and {count} are needed"
        )
    return None
