"""One speaker: messages on the standard library's logging, printed by one rank.

    configure_logging()
    LOGGER.info("building GPT model ...")               # rank 0
    LOGGER.info(log_line, extra=FROM_LAST_RANK)         # the rank that holds the loss
    LOGGER.warning("rank 3 alone saw this", extra=FROM_EVERY_RANK)

A program calls `configure_logging` once; the package only ever logs.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from types import MappingProxyType
from typing import TextIO

LOGGER = logging.getLogger("megatron_let")

FROM_LAST_RANK: Mapping[str, object] = MappingProxyType({"speaker": "last"})
FROM_EVERY_RANK: Mapping[str, object] = MappingProxyType({"speaker": "every"})


def configure_logging(
    *, level: int = logging.INFO, timestamps: bool = False, stream: TextIO | None = None
) -> logging.Logger:
    """Send the package's messages to `stream` (default: standard output as it is at each message); return the logger.

    Each message is printed by rank 0 alone unless it names another speaker (`extra=FROM_LAST_RANK`). Warnings and
    errors carry their level. `timestamps` puts Megatron's ` [2025-01-31 12:00:00.123456]` before each line.
    """
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
    handler = _StreamOfTheMoment(stream)
    handler.setFormatter(_LineFormatter(timestamps))
    handler.addFilter(_is_speaker)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return LOGGER


def quiet_third_parties() -> None:
    """Leave out what torch and megatron-core warn of on every run and nobody can act on.

    megatron-core about packages that only GPUs need and about its own old names; torch about older calls that
    megatron-core still makes.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)


class _StreamOfTheMoment(logging.StreamHandler):
    """Writes to the given stream, or to whatever standard output is when the message comes."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._is_given = stream is not None
        self._is_failing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if not self._is_given:
            self.stream = sys.stdout
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once on standard error that lines cannot be written, such as on a full disk; the program goes on."""
        problem = sys.exc_info()[1]
        if not isinstance(problem, OSError):
            super().handleError(record)
        elif not self._is_failing:
            self._is_failing = True
            with suppress(OSError, ValueError):
                print(
                    f"warning: log lines cannot be written ({problem.strerror or problem})", file=sys.stderr
                )


class _LineFormatter(logging.Formatter):
    """A message as its text alone, with level and time where asked for."""

    def __init__(self, timestamps: bool) -> None:
        super().__init__()
        self._timestamps = timestamps

    def format(self, record: logging.LogRecord) -> str:
        """Return the line to print."""
        line = super().format(record)
        if record.levelno >= logging.WARNING:
            line = f"{record.levelname.lower()}: {line}"
        if self._timestamps:
            time = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S.%f")
            line = f" [{time}] {line}"
        return line


def _is_speaker(record: logging.LogRecord) -> bool:
    """Return whether this rank is the one that says this; alone, a program says everything."""
    speaker = getattr(record, "speaker", "first")
    if speaker == "every":
        return True
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return rank == (world_size - 1 if speaker == "last" else 0)
