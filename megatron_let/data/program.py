"""What the data programs share: their command line, and how each way to end looks. None of them is a traceback.

A program is a function that yields the lines to print; `run_program` prints them and returns the exit status.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn, TextIO

from megatron_let.errors import EXIT_BAD_CONFIGURATION, EXIT_DONE, ConfigError, LetError

EXIT_INTERRUPTED = 128 + signal.SIGINT
# As a program ends that the signal of a closed pipe kills: what was to be printed was not all printed.
EXIT_OUTPUT_CLOSED = 128 + signal.SIGPIPE


class Interrupted(LetError):
    """Ctrl-C, with a word on what is left to do."""

    exit_code = EXIT_INTERRUPTED


class ProgramParser(argparse.ArgumentParser):
    """Shows the program's own words as help, takes no abbreviations, says what is wrong in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message} (--help lists the flags)")


def utf8_name(name: str) -> str:
    """Return a name that goes into texts and file names of others, as an argparse type.

    Raises:
        argparse.ArgumentTypeError: its bytes are not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{name!a} is not UTF-8: give another name") from None
    return name


def run_program(work: Callable[[], Iterable[str]]) -> int:
    """Print the lines that `work` yields and return the exit status; an error is one line on stderr."""
    try:
        for line in work():
            _print(line)
        sys.stdout.flush()
        return EXIT_DONE
    except SystemExit:  # --help
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            raise
        return _output_closed()
    except LetError as error:
        return _failed(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _failed("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        return _output_closed()
    except OSError as error:
        what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
        return _failed(f"{what}: {error.strerror or error}", EXIT_BAD_CONFIGURATION)


def command_line() -> str:
    """Return this program's command line as a shell takes it; a name that is not UTF-8 is spelled out."""
    return shlex.join(sys.argv).encode("utf-8", "backslashreplace").decode("utf-8")


def say(line: str) -> None:
    """Print what is no result on stderr."""
    print(line, file=sys.stderr, flush=True)


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except UnicodeEncodeError:  # a name that is not UTF-8, or a text in a terminal of few characters
        encoding = sys.stdout.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _failed(message: str, exit_code: int) -> int:
    try:
        say(f"error: {message}")
    except BrokenPipeError:
        _discard(sys.stderr)
    return exit_code


def _output_closed() -> int:
    """Whoever read the output has gone, as `head` does: say nothing, and let Python's own last flush pass."""
    _discard(sys.stdout)
    return EXIT_OUTPUT_CLOSED


def _discard(stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # not every stream stands for a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
