"""What the tests of bad input share: run the whole program on some ranks and look at how it was refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_let.data.digests import sha256_of
from megatron_let.data.indexed import check_indexed
from megatron_let.data.manifest import Manifest, write_manifest
from megatron_let.data.tokenizer_facts import TokenizerFacts, facts_of_directory
from megatron_let.directory_lock import LOCK_FILE
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train

"""Seconds after which ranks that disagree about a mistake, and so wait for each other, count as hung."""


class Outcome(NamedTuple):
    """How one rank ended: its exit code, or the message it was refused with; and what it logged."""

    code: int | None
    message: str
    lines: list[str]


def outcome(argv: list[str]) -> Outcome:
    """Run the program on this rank; a user's mistake is a result like another, any other exception is not."""
    with logged_lines() as lines:
        try:
            return Outcome(train(argv), "", lines)
        except ConfigError as mistake:
            return Outcome(None, str(mistake), lines)


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """Yield a list that is filled with what this rank logs, each line after its level."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    collector, level, propagate = Collector(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(collector)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield lines
    finally:
        LOGGER.removeHandler(collector)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate


def run(pool: RankPool, changes: dict[str, Any], *, world_size: int = 2) -> Outcome:
    """Run the tiny student with `changes`; return rank 0's outcome, every rank having ended with the same one."""
    argv = arguments(TINY_STUDENT, changes)
    outcomes = pool.run(world_size, outcome, argv)
    assert {(each.code, each.message) for each in outcomes} == {(outcomes[0].code, outcomes[0].message)}
    return outcomes[0]


def refusal(
    pool: RankPool, changes: dict[str, Any], *, world_size: int = 2, untouched: Path | None = None
) -> str:
    """Return the one line with which every rank refuses the run; `untouched`: a directory that must stay as it is."""
    before = None if untouched is None else content_of(untouched)
    result = run(pool, changes, world_size=world_size)
    assert result.code is None, f"the run was not refused but ended with {result.code}"
    assert_readable(result.message)
    if untouched is not None:
        assert content_of(untouched) == before
    return result.message


def assert_readable(message: str) -> None:
    """Assert that a message is one line of a length that a person reads."""
    assert message
    assert "\n" not in message
    assert len(message) < 1000


def content_of(directory: Path) -> dict[str, str | None]:
    """Return every file below a directory with its sha256, directories with None; not the exit status and its lock."""
    return {
        str(path.relative_to(directory)): sha256_of(path) if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if path.name not in ("exit_status.json", LOCK_FILE)
    }


def write_word_tokenizer(directory: Path, words: list[str]) -> None:
    """Write a Hugging Face tokenizer of whole words to `directory`; the last word ends documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    directory.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": words[-1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _facts(tokenizer: Path) -> TokenizerFacts:
    facts = facts_of_directory(tokenizer)
    assert facts is not None
    return facts


def write_manifest_for(prefix: Path, tokenizer: Path | None, **changes: Any) -> None:
    """Write the manifest of a data set made with the tokenizer in directory `tokenizer` (None: with none known)."""
    summary = check_indexed(str(prefix))
    values: dict[str, Any] = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_name": str(tokenizer),
        "tokenizer_fingerprint": None if tokenizer is None else _facts(tokenizer).fingerprint,
        "encoding_fingerprint": None if tokenizer is None else _facts(tokenizer).encoding_fingerprint,
        "vocab_size": 61,
        "eod": 60,
        "append_eod": True,
        "json_key": "text",
        "dtype": summary.dtype,
        "max_token_id": 60,
        "documents": summary.documents,
        "sequences": summary.sequences,
        "tokens": summary.tokens,
        "bytes": 1000,
        "sources": (),
    }
    write_manifest(str(prefix), Manifest(**{**values, **changes}))
