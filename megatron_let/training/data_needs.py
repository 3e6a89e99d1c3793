"""What a run reads: its tokenizer and how many samples of each split. The same for training and for its cache."""

from __future__ import annotations

from megatron_let.config.run_config import RunConfig
from megatron_let.data.tokenizers import Tokenizer, build_tokenizer
from megatron_let.errors import ConfigError
from megatron_let.mcore.datasets import SampleCounts


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


def sample_counts(config: RunConfig, total_iterations: int) -> SampleCounts:
    """Return how many samples a run of so many iterations reads of each split."""
    evaluated = config.validation.eval_iters * config.training.global_batch_size
    train = config.training.train_samples or total_iterations * config.training.global_batch_size
    return SampleCounts(train=train, valid=evaluated, test=evaluated)
