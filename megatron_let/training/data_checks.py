"""Do data, student and teacher speak of the same tokens? Checked before anything large is built."""

from __future__ import annotations

from pathlib import Path

from megatron_let.config.run_config import RunConfig
from megatron_let.data.fingerprint import fingerprint_of_directory, require_same_tokenizer
from megatron_let.data.indexed import check_indexed, max_token_id
from megatron_let.data.manifest import manifest_path, read_manifest, require_manifest_of
from megatron_let.data.table_checks import require_tables
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.datasets import data_prefixes
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.plain_json import shown
from megatron_let.training.checkpoint_choice import tokenizer_fingerprint_of_checkpoint
from megatron_let.training.checkpoint_files import newest_iteration_directory
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
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"data set {prefix} was made with tokenizer {shown(manifest.tokenizer_name, 300)} "
            f"({shown(manifest.tokenizer_fingerprint[:12])}), not with {tokenizer.name} ({tokenizer.fingerprint[:12]}); "
            "give its tokenizer or preprocess the data again"
        )
    return None


def _check_teacher_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """Compare the student's tokenizer with the teacher's; return a warning when one of them is unknown."""
    path = Path(str(config.let.let_teacher_load))
    if teacher_format(config) == "hf":
        fingerprint = fingerprint_of_directory(path)
    else:
        fingerprint = tokenizer_fingerprint_of_checkpoint(newest_iteration_directory(path))
    is_known = require_same_tokenizer(
        data=f"the student's tokenizer {tokenizer.name}",
        data_fingerprint=tokenizer.fingerprint,
        teacher=str(path),
        teacher_fingerprint=fingerprint,
    )
    if is_known:
        return None
    return f"teacher {path} and student cannot be compared by tokenizer; only the range of ids is checked"
