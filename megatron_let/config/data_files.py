"""`--data-args-path` and `--per-split-data-args-path`: files that hold what --data-path and its like would be given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_let.errors import ConfigError
from megatron_let.plain_json import is_name, parse_json, shown
from megatron_let.regular_files import read_text

_SPLITS = {"train": "train_data_path", "valid": "valid_data_path", "test": "test_data_path"}


def with_data_files(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings (dest -> value) with the content of those files in place of their names.

    What a run prints and saves is then what it reads, whatever becomes of the file.

    Raises:
        ConfigError: a file cannot be read or says nothing of use, or the same is given in both ways.
    """
    values = dict(values)
    if values["data_args_path"] is not None:
        path = values["data_args_path"]
        _require_alone(values, "--data-args-path", ["data_path"])
        values["data_path"] = tuple(
            _checked("--data-args-path", path, _read("--data-args-path", path).split())
        )
        if not values["data_path"]:
            raise ConfigError(f"--data-args-path {path} is empty; it holds what --data-path takes")
        values["data_args_path"] = None
    if values["per_split_data_args_path"] is not None:
        path = values["per_split_data_args_path"]
        _require_alone(values, "--per-split-data-args-path", list(_SPLITS.values()))
        values.update(_per_split(path))
        values["per_split_data_args_path"] = None
    return values


def _require_alone(values: Mapping[str, Any], flag: str, others: list[str]) -> None:
    given = [f"--{name.replace('_', '-')}" for name in others if values[name] is not None]
    if given:
        raise ConfigError(f"{flag} and {' and '.join(given)} say the same thing in two ways; give one")


def _per_split(path: str) -> dict[str, tuple[str, ...]]:
    """Return the blends in a JSON file: {"train": [words], "valid": "words", ...}, as Megatron-LM reads it."""
    text = _read("--per-split-data-args-path", path)
    try:
        content = parse_json(text)
    except ValueError as problem:
        raise ConfigError(f"--per-split-data-args-path {path} is not JSON: {problem}") from problem
    if not isinstance(content, dict) or not content or not content.keys() <= _SPLITS.keys():
        raise ConfigError(
            f"--per-split-data-args-path {path} must hold an object with the keys train, valid and test"
        )
    found = {}
    for split, blend in content.items():
        words = blend.split() if isinstance(blend, str) else blend
        if words is None or words == []:
            continue
        if not isinstance(words, list) or not all(
            isinstance(word, str | int | float) and not isinstance(word, bool) for word in words
        ):
            raise ConfigError(
                f"--per-split-data-args-path {path}: {split} must be a list of words, or one string"
            )
        found[_SPLITS[split]] = tuple(_checked("--per-split-data-args-path", path, map(str, words)))
    if not found:
        raise ConfigError(f"--per-split-data-args-path {path} names no data set")
    return found


def _checked(flag: str, path: str, words: Iterable[str]) -> Iterator[str]:
    for word in words:
        if not is_name(word):
            raise ConfigError(f"{flag} {path}: {shown(word)} is not text that a path can have")
        yield word


def _read(flag: str, path: str) -> str:
    try:
        return read_text(path)
    except OSError as problem:
        raise ConfigError(f"{flag} {path} cannot be read: {problem.strerror or problem}") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{flag} {path} cannot be read: it is not UTF-8 text") from problem
