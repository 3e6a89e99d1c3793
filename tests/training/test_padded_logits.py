"""Whether the ids that pad the vocabulary take part in the softmax: kept with the checkpoint, a change told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.run_config import RunConfig
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.checkpoint_choice import check_same_model
from megatron_let.training.checkpoints import TokenizerRecord

NAME = "mask_padded_logits"
TOKENIZER = TokenizerRecord(61, None)


def config_of(*, is_masked: bool) -> RunConfig:
    changes: dict[str, Any] = {"--mock-data": None, "--no-mask-padded-logits": False if is_masked else None}
    return parse_arguments(arguments(TINY_STUDENT, changes))


def run_of(config: RunConfig) -> dict[str, Any]:
    return {"config": config.to_dict(), "vocab_size": 61, "tokenizer_fingerprint": None}


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        (True, True, ""),
        (False, False, ""),
        (True, False, "was trained without --no-mask-padded-logits and this run goes on with it"),
        (False, True, "was trained with --no-mask-padded-logits and this run goes on without it"),
        (None, True, ""),
        (None, False, "was trained without --no-mask-padded-logits and this run goes on with it"),
    ],
)
def test_a_change_on_resume_is_told(
    was: bool | None, now: bool, expected: str, logged: pytest.LogCaptureFixture
) -> None:
    """None: a checkpoint from before the choice."""
    saved = run_of(config_of(is_masked=was is not False))
    assert saved["config"]["model"][NAME] is (was is not False)
    if was is None:
        del saved["config"]["model"][NAME]
    check_same_model(config_of(is_masked=now), TOKENIZER, saved, Path("iter_0000002"))
    assert len(logged.records) == bool(expected)
    assert expected in "".join(record.message for record in logged.records)
