"""What `--input` names to the paths of single inputs: files, globs, directories and standard input."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_let.data.input_rules import STANDARD_INPUT, UnreadFile
from megatron_let.data.journal import is_working_directory
from megatron_let.errors import ConfigError

OTHER_KIND = "other_kind"
HIDDEN = "hidden"
OWN_OUTPUT = "output_of_preprocessing"
UNFINISHED = "in_a_partial_directory"

_COMPRESSION_SUFFIXES = (".gz", ".zst", ".zstd")
_DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".parquet")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_GLOB_CHARACTERS = "*?["
# What this program and its like leave where their output is.
_OWN_DIRECTORY_SUFFIX = ".partial"
_OWN_FILE_SUFFIXES = (".manifest.json", "_subsets.json", "_blend.txt", "_skipped.jsonl")


@dataclass(frozen=True)
class InputPath:
    """One input, not looked at yet."""

    path: str
    is_named: bool
    """Given by its own name, and not found in a directory or by a glob."""


@dataclass(frozen=True)
class ExpandedInputs:
    """What the words behind `--input` stand for, in the order given, what one glob or directory gives sorted."""

    paths: tuple[InputPath, ...]
    unread: tuple[UnreadFile, ...]


def expand_inputs(inputs: Sequence[str]) -> ExpandedInputs:
    """Return the paths that the inputs stand for, and the files of directories that they leave out.

    A file that is named is taken whatever its name. Of a directory the files below it with a known suffix are, hidden
    ones and those in hidden directories excepted, and what preprocessing itself puts there (NAME.partial/,
    NAME.manifest.json, NAME_subsets.json, NAME_blend.txt, NAME_skipped.jsonl).

    Raises:
        ConfigError: nothing is named, a glob has no match, a directory holds no data or cannot be read, or an address is
            given in place of a path.
    """
    if not inputs:
        raise ConfigError(
            "--input names nothing: give files, directories, globs in quotes, or - for standard input"
        )
    if list(inputs).count(STANDARD_INPUT) > 1:
        raise ConfigError("--input - is given twice: standard input can be read once")
    unread: list[UnreadFile] = []
    return ExpandedInputs(tuple(path for given in inputs for path in _expand(given, unread)), tuple(unread))


def refuse_address(path: str, what: str) -> None:
    """Raise ConfigError for an address (s3://..., https://...), which no file system knows."""
    if _ADDRESS.match(path):
        raise ConfigError(
            f"{what} is an address, and only files of this machine are read and written: copy what lies there, mount it, or "
            "pipe it into a program that takes --input -"
        )


def data_suffix(path: str) -> str:
    """Return the path's suffix in lower case, that of a compression left out; "" if it has none."""
    name = Path(path.lower())
    return (name.with_suffix("") if name.suffix in _COMPRESSION_SUFFIXES else name).suffix


def _expand(given: str, unread: list[UnreadFile]) -> Iterator[InputPath]:
    refuse_address(given, f"input {given}")
    if given == STANDARD_INPUT:
        yield InputPath(given, is_named=True)
    elif os.path.isdir(given):
        yield from _files_below(given, unread)
    elif any(character in given for character in _GLOB_CHARACTERS) and not os.path.lexists(given):
        yield from _matches(given, unread)
    else:
        yield InputPath(given, is_named=True)


def _matches(pattern: str, unread: list[UnreadFile]) -> Iterator[InputPath]:
    """Yield what the shell would have made of the pattern; with `**` the files alone, which it finds at any depth."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if "**" in pattern:
        matches = [path for path in matches if not os.path.isdir(path)]
    if not matches:
        raise ConfigError(f"input {pattern} matches no file")
    for path in matches:
        if os.path.isdir(path):
            yield from _files_below(path, unread)
        else:
            yield InputPath(path, is_named=False)


def _files_below(directory: str, unread: list[UnreadFile]) -> list[InputPath]:
    files = sorted(_walk(directory))
    known = [InputPath(path, is_named=False) for path, reason in files if not reason]
    if not known:
        raise ConfigError(
            f"input directory {directory} holds no file of a known kind ({', '.join(_DATA_SUFFIXES)}, each also with "
            f"{', '.join(_COMPRESSION_SUFFIXES)}): name the files if theirs are others"
        )
    unread += [UnreadFile(path, reason) for path, reason in files if reason]
    return known


def _walk(directory: str) -> Iterator[tuple[str, str]]:
    """Yield the files below a directory, each with the reason for leaving it out, "" if there is none.

    Links are followed, but no directory is entered twice: links can form a ring. Directories that are left out come last,
    since a link may lead into one; of what is in them files count whose names are those of data.
    """
    entered, left_out = {_identity(directory)}, list[tuple[str, str]]()
    yield from _walk_one(directory, "", entered, left_out)
    for path, reason in left_out:
        if _identity(path) not in entered:
            entered.add(_identity(path))
            yield from _walk_one(path, reason, entered, [])


def _walk_one(
    directory: str, inherited: str, entered: set[tuple[int, int]], left_out: list[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Yield the files below a directory but those in directories that are to be left out; note these."""

    def refuse(error: OSError) -> None:
        if not inherited:
            raise ConfigError(f"cannot read input directory {error.filename}: {error.strerror}") from error

    for parent, directories, files in os.walk(directory, followlinks=True, onerror=refuse):
        for name in sorted(directories):
            path = os.path.join(parent, name)
            reason = "" if inherited else _reason_of_directory(name)
            if is_working_directory(path):
                directories.remove(name)
            elif reason:
                directories.remove(name)
                left_out.append((path, reason))
            elif _identity(path) in entered:
                directories.remove(name)
            else:
                entered.add(_identity(path))
        directories.sort()
        for name in files:
            reason = inherited or _reason_of_file(name)
            if reason not in (HIDDEN, UNFINISHED) or data_suffix(name) in _DATA_SUFFIXES:
                yield os.path.join(parent, name), reason


def _reason_of_directory(name: str) -> str:
    if name.startswith("."):
        return HIDDEN
    return UNFINISHED if name.endswith(_OWN_DIRECTORY_SUFFIX) else ""


def _reason_of_file(name: str) -> str:
    if name.startswith("."):
        return HIDDEN
    if name.endswith(_OWN_FILE_SUFFIXES):
        return OWN_OUTPUT
    return "" if data_suffix(name) in _DATA_SUFFIXES else OTHER_KIND


def _identity(directory: str) -> tuple[int, int]:
    status = os.stat(directory)
    return status.st_dev, status.st_ino
