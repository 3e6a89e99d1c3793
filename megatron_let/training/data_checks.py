"""Do data, student and teacher speak of the same tokens? Checked before anything large is built."""

from __future__ import annotations

from pathlib import Path

from megatron_let.config.run_config import RunConfig
from megatron_let.data.encoding_fingerprint import encode_otherwise
from megatron_let.data.indexed import check_indexed, max_token_id
from megatron_let.data.manifest import manifest_path, read_manifest, require_manifest_of
from megatron_let.data.recorded_tokenizer import difference_from_manifest, difference_of_manifests
from megatron_let.data.table_checks import require_tables
from megatron_let.data.tokenizer_facts import TokenizerFacts, difference_in_words, facts_of_directory
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.datasets import data_prefixes
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.training.checkpoint_choice import tokenizer_of_checkpoint
from megatron_let.training.checkpoint_files import newest_iteration_directory
from megatron_let.training.checkpoints import TokenizerRecord
from megatron_let.training.teachers import check_teacher, teacher_format


def check_data(
    config: RunConfig, tokenizer: Tokenizer, context: ParallelContext, *, needs_teacher: bool
) -> None:
    """Check the data files and that data, student and teacher share a tokenizer; every rank calls this.

    What cannot be compared (mock data, NullTokenizer, files without a manifest, a teacher without tokenizer files)
    gets one warning; that token ids fit the vocabulary is checked in any case.

    Raises:
        ConfigError: a damaged data set, an id outside the vocabulary, or tokenizers that differ.
    """
    for warning in context.on_rank_0(lambda: data_warnings(config, tokenizer, needs_teacher=needs_teacher)):
        LOGGER.warning(warning)


def data_warnings(config: RunConfig, tokenizer: Tokenizer, *, needs_teacher: bool) -> list[str]:
    """Do the same on this process alone; return the warnings, each once.

    Raises:
        ConfigError: as check_data.
    """
    warnings = [_check_prefix(prefix, tokenizer) for prefix in data_prefixes(config)]
    if needs_teacher:
        check_teacher(config, num_ids=tokenizer.vocab_size)
        warnings.append(_check_teacher_tokenizer(config, tokenizer))
        if config.data.mock_data:
            warnings.append("mock data was made with no tokenizer; only the range of ids is checked")
    return list(dict.fromkeys(warning for warning in warnings if warning is not None))


def _check_prefix(prefix: str, tokenizer: Tokenizer) -> str | None:
    """Check one data set; return a warning when its tokenizer is unknown."""
    summary = check_indexed(prefix)
    require_tables(prefix, LOGGER.info)
    manifest = read_manifest(prefix)
    if manifest is not None:
        require_manifest_of(manifest, summary)
    largest = max_token_id(prefix) if manifest is None else manifest.max_token_id
    if largest >= tokenizer.vocab_size:
        raise ConfigError(
            f"data set {prefix} holds token id {largest}, but tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids "
            f"(0 to {tokenizer.vocab_size - 1}); use the tokenizer it was preprocessed with"
        )
    if manifest is None or manifest.tokenizer_fingerprint is None or tokenizer.fingerprint is None:
        return f"{manifest_path(prefix)} does not say which tokenizer made the data; only the range of ids is checked"
    difference = difference_from_manifest(tokenizer, manifest)
    if difference and manifest.tokenizer_fingerprint == tokenizer.fingerprint:
        return f"data set {prefix}: {difference}; the model will be used with a tokenizer that it was not trained with"
    if difference:
        raise ConfigError(f"data set {prefix}: {difference}; give its tokenizer or preprocess the data again")
    if manifest.encoding_fingerprint is None:
        return f"{manifest_path(prefix)} does not say how its tokenizer encodes: its vocabulary alone is compared"
    return None


def record_of_tokenizer(config: RunConfig, tokenizer: Tokenizer, context: ParallelContext) -> TokenizerRecord:
    """Return what a checkpoint remembers of the tokenizer; every rank calls this.

    Raises:
        ConfigError: a manifest cannot be read, or two data sets were encoded in different ways: a blend of the two would
            hold one text as two rows of ids.
    """
    encoding = context.on_rank_0(lambda: _encoding_of_data(config, tokenizer))
    return TokenizerRecord(tokenizer.vocab_size, tokenizer.fingerprint, encoding)


def _encoding_of_data(config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """Return the one encoding fingerprint of all data sets, the tokenizer's own where not all of them say it."""
    found = [(prefix, read_manifest(prefix)) for prefix in data_prefixes(config)]
    known = [(prefix, manifest) for prefix, manifest in found if manifest is not None]
    telling = [(prefix, manifest) for prefix, manifest in known if manifest.encoding_fingerprint is not None]
    for prefix, manifest in telling[1:]:
        first_prefix, first = telling[0]
        if difference := difference_of_manifests(first, manifest):
            raise ConfigError(
                f"data sets {first_prefix} and {prefix} differ in their tokenizers, {difference}; preprocess one again"
            )
    if telling and len(telling) == len(found):
        return telling[0][1].encoding_fingerprint
    return tokenizer.encoding_fingerprint


def _check_teacher_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """Compare the student's tokenizer with the teacher's; return a warning where the teacher may read other ids."""
    path = Path(str(config.let.let_teacher_load))
    mine = tokenizer.facts
    facts, theirs = _teachers_tokenizer(config, path)
    if mine is None or theirs is None:
        return f"teacher {path} and student cannot be compared by tokenizer; only the range of ids is checked"
    words = "" if facts is None else f": {difference_in_words(mine, facts)} (the student's first)"
    if mine.fingerprint != theirs[0]:
        raise ConfigError(
            f"the student's data and the teacher use different tokenizers{words}: {tokenizer.name} has "
            f"{mine.fingerprint[:12]}, {path} has {theirs[0][:12]}; preprocess the data with the teacher's tokenizer"
        )
    if encode_otherwise(mine.encoding_fingerprint, theirs[1]):
        return f"teacher {path} is shown ids that its own tokenizer would not give{words}"
    return None


def _teachers_tokenizer(
    config: RunConfig, path: Path
) -> tuple[TokenizerFacts | None, tuple[str, str | None] | None]:
    """Return what is known of the teacher's tokenizer: the whole of it, and its two fingerprints."""
    if teacher_format(config) != "hf":
        return None, tokenizer_of_checkpoint(newest_iteration_directory(path))
    facts = facts_of_directory(path)
    return facts, None if facts is None else (facts.fingerprint, facts.encoding_fingerprint)
