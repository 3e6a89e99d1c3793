"""Errors with an exit status: what a launcher or a requeue script can act on.

Exit codes of a run: 0 done, 1 crash, 2 bad configuration or input, 3 stopped early with everything saved, 4 bad numbers
(NaN or infinity again and again, or out of the teacher): starting it again would meet them again.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_BAD_CONFIGURATION = 2
EXIT_PREEMPTED = 3
EXIT_BAD_NUMBERS = 4


class LetError(Exception):
    """Base of every error that ends a run with a message instead of a traceback."""

    exit_code = EXIT_CRASH


class ConfigError(LetError):
    """The user's mistake: one line that says what was given, what is allowed and what to do."""

    exit_code = EXIT_BAD_CONFIGURATION


class ProblemsError(ConfigError):
    """All that keeps a run from starting: more than one mistake, told at once."""

    SEPARATOR = "\nerror: "

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(self.SEPARATOR.join(lines))


def raise_all(problems: Sequence[ConfigError]) -> None:
    """Raise what was found, together when it is more than one; return when it is nothing."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ProblemsError([str(problem) for problem in problems])


class MissingFilesError(ConfigError):
    """What a flag names is not on this machine; it may be where the run will be."""


class BadNumbersError(LetError):
    """The numbers went bad, not the program: the line says which number, where, and what to do."""

    exit_code = EXIT_BAD_NUMBERS
