"""One speaker: which rank prints what."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator

import pytest

from megatron_let.log import FROM_EVERY_RANK, FROM_LAST_RANK, LOGGER, configure_logging


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Leave the logger as it was."""
    handlers, level, propagate = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate
    yield
    LOGGER.handlers[:], LOGGER.propagate = handlers, propagate
    LOGGER.setLevel(level)


def said_by(rank: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what rank `rank` of 3 prints of one message for each kind of speaker."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "3")
    stream = io.StringIO()
    configure_logging(stream=stream)
    LOGGER.info("first %d", 1)
    LOGGER.info("last", extra=FROM_LAST_RANK)
    LOGGER.warning("every", extra=FROM_EVERY_RANK)
    LOGGER.debug("nobody")
    return stream.getvalue()


def test_each_message_has_its_speaker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said_by("0", monkeypatch) == "first 1\nwarning: every\n"
    assert said_by("1", monkeypatch) == "warning: every\n"
    assert said_by("2", monkeypatch) == "last\nwarning: every\n"


def test_a_program_without_launcher_says_everything_once_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    configure_logging()
    configure_logging()
    LOGGER.info("first")
    LOGGER.info("last", extra=FROM_LAST_RANK)
    assert capsys.readouterr().out == "first\nlast\n"


def test_timestamps_have_megatrons_form() -> None:
    stream = io.StringIO()
    configure_logging(stream=stream, timestamps=True)
    LOGGER.info("iteration 1/ 10 |")
    assert re.fullmatch(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration 1/ 10 \|\n", stream.getvalue())


def test_a_full_disk_under_the_log_is_said_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    logger = configure_logging(stream=Full())
    logger.info("one")
    logger.info("two")
    assert capsys.readouterr().err == "warning: log lines cannot be written (No space left on device)\n"
