"""Data sets of one vocabulary and two encodings are not trained on as one, neither in a blend nor over a resume."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.data.tokenizers import build_tokenizer
from megatron_let.errors import ConfigError
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.testing.training import TINY_STUDENT, arguments, write_token_files
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.checkpoint_choice import check_same_model
from megatron_let.training.checkpoints import TokenizerRecord
from megatron_let.training.data_checks import record_of_tokenizer
from tests.training.bad_input import write_manifest_for

DIRECTORY = Path("/checkpoints/iter_0000004")
NOW = TokenizerRecord(61, "ab" * 32, "1:aa")


class OneRank:
    """What is asked of the ranks, for one."""

    def on_rank_0(self, action: Callable[[], Any]) -> Any:
        return action()


def _config(**changes: object) -> RunConfig:
    return resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)


def _blend(tmp_path: Path, *encodings: str | None) -> RunConfig:
    """Return a run on one data set for each encoding that a manifest states."""
    prefixes = [tmp_path / f"part{number}" for number in range(len(encodings))]
    for prefix, encoding in zip(prefixes, encodings, strict=True):
        write_token_files(prefix, [[1, 2, 3]] * 4)
        write_manifest_for(prefix, None, tokenizer_fingerprint="ab" * 32, encoding_fingerprint=encoding)
    words = [word for prefix in prefixes for word in ("1", str(prefix))]
    return _config(**{"--data-path": words})


def _record(config: RunConfig) -> TokenizerRecord:
    tokenizer = build_tokenizer(tokenizer_type="NullTokenizer", vocab_size=60)
    return record_of_tokenizer(config, tokenizer, cast(ParallelContext, OneRank()))


def test_a_blend_of_two_encodings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"part0 and .*part2 differ in their tokenizers, .*: encoding_fingerprint aa and bb"
    ):
        _record(_blend(tmp_path, "1:aa", None, "1:bb"))


def test_the_encoding_that_all_data_sets_state_is_remembered(tmp_path: Path) -> None:
    assert _record(_blend(tmp_path, "1:aa", "1:aa")).encoding_fingerprint == "1:aa"
    assert _record(_blend(tmp_path, "1:aa", None)).encoding_fingerprint is None  # a NullTokenizer has none


def _saved(config: RunConfig, record: TokenizerRecord, **changes: object) -> dict[str, Any]:
    return {
        "config": config.to_dict(),
        "vocab_size": record.vocab_size,
        "tokenizer_fingerprint": record.fingerprint,
        "encoding_fingerprint": record.encoding_fingerprint,
        **changes,
    }


def test_a_resume_on_data_of_another_encoding_is_refused() -> None:
    config = _config(**{"--mock-data": []})
    check_same_model(config, NOW, _saved(config, NOW), DIRECTORY)
    with pytest.raises(
        ConfigError, match=r"gives texts other ids, from the same vocabulary \(encoding bb, now aa\)"
    ):
        check_same_model(config, NOW, _saved(config, NOW, encoding_fingerprint="1:bb"), DIRECTORY)


def test_a_checkpoint_that_does_not_say_it_stays_usable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(**{"--mock-data": []})
    saved = _saved(config, NOW)
    del saved["encoding_fingerprint"]
    logger = logging.getLogger("megatron_let")
    logger.addHandler(caplog.handler)
    try:
        check_same_model(config, NOW, saved, DIRECTORY)
    finally:
        logger.removeHandler(caplog.handler)
    assert "does not say how its tokenizer encodes: its vocabulary alone is compared" in caplog.text
