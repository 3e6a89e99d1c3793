"""What a run reads: its tokenizer and how many samples of each split. The same for training and for its cache."""

from __future__ import annotations

from megatron_let.config.batches import batch_plan, train_iterations
from megatron_let.config.run_config import RunConfig
from megatron_let.data.tokenizers import Tokenizer, build_tokenizer
from megatron_let.errors import ConfigError
from megatron_let.mcore.datasets import SampleCounts
from megatron_let.training.state import TrainingState


def build_run_tokenizer(config: RunConfig) -> Tokenizer:
    """Build the tokenizer of a run.

    Raises:
        ConfigError: it cannot be built, or has another size than the flags state.
    """
    given = config.tokenizer
    tokenizer = build_tokenizer(
        tokenizer_type=given.tokenizer_type,
        tokenizer_model=given.tokenizer_model,
        vocab_file=given.vocab_file,
        merge_file=given.merge_file,
        vocab_size=config.model.vocab_size,
    )
    stated = config.model.vocab_size
    if given.tokenizer_type != "NullTokenizer" and stated is not None and stated != tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab-size {stated}: tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids; leave the flag out"
        )
    return tokenizer


def total_iterations(config: RunConfig, world_size: int, start: TrainingState) -> int:
    """Return the iteration at which a run ends that goes on from `start`.

    A run may go on with another batch size (`--data-override`): what is left of `--train-samples` is then counted from
    the samples that are consumed.
    """
    total, samples = train_iterations(config, world_size), config.training.train_samples
    plan = batch_plan(config, world_size)
    if samples is None or start.consumed_samples == plan.samples_of_iterations(start.iteration):
        return total
    iteration, consumed = start.iteration, start.consumed_samples
    while consumed + plan.global_batch_size(consumed) <= samples:
        consumed += plan.global_batch_size(consumed)
        iteration += 1
    return iteration


def sample_counts(config: RunConfig, total: int, start: TrainingState) -> SampleCounts:
    """Return how many samples a run that goes on from `start` to iteration `total` reads of each split."""
    batch = config.training.global_batch_size
    evaluated = config.validation.eval_iters * batch
    train = config.training.train_samples or start.consumed_samples + (total - start.iteration) * batch
    return SampleCounts(train=train, valid=evaluated, test=evaluated)
