"""What `--input` names to the paths of single inputs: files, globs, directories and standard input."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_let.data.input_rules import STANDARD_INPUT
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER

_COMPRESSION_SUFFIXES = (".gz", ".zst", ".zstd")
_DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".parquet")
_GLOB_CHARACTERS = "*?["
# What this program and its like leave where their output is.
_OWN_DIRECTORY_SUFFIX = ".partial"
_OWN_FILE_SUFFIXES = (".manifest.json", "_subsets.json", "_blend.txt")


def expand_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    """Return the paths that the inputs stand for, in the order given, those of one glob or directory sorted.

    A file that is named is taken whatever its name. Of a directory the files below it with a known suffix are, hidden
    ones and those in hidden directories excepted, and what preprocessing itself puts there (NAME.partial/, NAME.manifest.json,
    NAME_subsets.json, NAME_blend.txt); a line in the log tells of the others.

    Raises:
        ConfigError: nothing is named, a glob has no match, or a directory holds no data or cannot be read.
    """
    if not inputs:
        raise ConfigError(
            "--input names nothing: give files, directories, globs in quotes, or - for standard input"
        )
    if list(inputs).count(STANDARD_INPUT) > 1:
        raise ConfigError("--input - is given twice: standard input can be read once")
    return tuple(path for given in inputs for path in _expand(given))


def data_suffix(path: str) -> str:
    """Return the path's suffix in lower case, that of a compression left out; "" if it has none."""
    name = Path(path.lower())
    return (name.with_suffix("") if name.suffix in _COMPRESSION_SUFFIXES else name).suffix


def _expand(given: str) -> Iterator[str]:
    if given == STANDARD_INPUT:
        yield given
    elif os.path.isdir(given):
        yield from _files_below(given)
    elif any(character in given for character in _GLOB_CHARACTERS) and not os.path.lexists(given):
        yield from _matches(given)
    else:
        yield given


def _matches(pattern: str) -> Iterator[str]:
    """Yield what the shell would have made of the pattern; with `**` the files alone, which it finds at any depth."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if "**" in pattern:
        matches = [path for path in matches if not os.path.isdir(path)]
    if not matches:
        raise ConfigError(f"input {pattern} matches no file")
    for path in matches:
        yield from _files_below(path) if os.path.isdir(path) else [path]


def _files_below(directory: str) -> list[str]:
    files = sorted(_walk(directory))
    known = [path for path in files if data_suffix(path) in _DATA_SUFFIXES]
    others = [path for path in files if data_suffix(path) not in _DATA_SUFFIXES]
    if not known:
        raise ConfigError(
            f"input directory {directory} holds no file of a known kind ({', '.join(_DATA_SUFFIXES)}, each also with "
            f"{', '.join(_COMPRESSION_SUFFIXES)}): name the files if theirs are others"
        )
    if others:
        LOGGER.warning(
            "input directory %s: %d files of other kinds are not read, the first of them %s",
            directory,
            len(others),
            others[0],
        )
    return known


def _walk(directory: str) -> Iterator[str]:
    """Yield the files below a directory. Links are followed, but no directory is entered twice: links can form a ring."""
    entered = {_identity(directory)}
    for parent, directories, files in os.walk(directory, followlinks=True, onerror=_refuse):
        for name in sorted(directories):
            is_left_out = name.startswith(".") or name.endswith(_OWN_DIRECTORY_SUFFIX)
            identity = None if is_left_out else _identity(os.path.join(parent, name))
            if identity is None or identity in entered:
                directories.remove(name)
            else:
                entered.add(identity)
        directories.sort()
        yield from (
            os.path.join(parent, name)
            for name in files
            if not name.startswith(".") and not name.endswith(_OWN_FILE_SUFFIXES)
        )


def _identity(directory: str) -> tuple[int, int]:
    status = os.stat(directory)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> None:
    raise ConfigError(f"cannot read input directory {error.filename}: {error.strerror}") from error
