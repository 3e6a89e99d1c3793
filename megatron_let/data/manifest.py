"""`PREFIX.manifest.json`: what a pair of token files was made from. Training checks its tokenizer fingerprint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_let.data.indexed import IndexedSummary
from megatron_let.errors import ConfigError
from megatron_let.plain_json import read_json, shown

MANIFEST_VERSION = 1
MAX_SKIPPED_EXAMPLES = 10
"""How many skipped records a manifest names."""


@dataclass(frozen=True)
class SourceFile:
    """One input file, as it was when read."""

    path: str
    size: int
    """Bytes on disk, compressed where the file is."""
    sha256: str = ""
    """Of those bytes; empty in manifests that did not know it."""


@dataclass(frozen=True)
class SubsetCount:
    """What one subset of a data set holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of its texts."""

    def __add__(self, other: SubsetCount) -> SubsetCount:
        return SubsetCount(
            self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes
        )


@dataclass(frozen=True)
class Manifest:
    """The record beside PREFIX.bin and PREFIX.idx. `records` = `documents` + the sum of `skipped`."""

    tokenizer_type: str
    tokenizer_name: str
    """Path or size, for messages; the fingerprint is what counts."""
    tokenizer_fingerprint: str | None
    vocab_size: int
    """The tokenizer's largest id + 1."""
    eod: int
    append_eod: bool
    json_key: str
    dtype: str
    """Numpy name of the ids' type in PREFIX.bin."""
    max_token_id: int
    """Largest id that occurs in PREFIX.bin."""
    documents: int
    sequences: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the texts that were written."""
    sources: tuple[SourceFile, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Records that gave no document, by reason."""
    skipped_examples: tuple[str, ...] = ()
    """The first few of them: file, line, reason."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Files of directories and globs that were left out, by reason."""
    unread_examples: tuple[str, ...] = ()
    """The first few of them: file, reason."""
    shard: str = ""
    """Which part of a job over many nodes this is, such as 3/8; empty for a whole one."""
    shard_of: str = ""
    """Digest of all the job's files."""
    made: Mapping[str, str] = field(default_factory=dict, compare=False)
    """When, by which command, by which encoder and versions; nothing of it decides over a byte."""
    records: int = 0
    """Records read for these files; 0 in manifests that did not count them."""
    subset: str | None = None
    """The one subset that these files hold, where a run wrote a pair for each."""
    subsets: Mapping[str, SubsetCount] = field(default_factory=dict)
    """What each subset makes up, by the name in the records; "" is for documents without one."""
    eod_in_text: int = 0
    """How often a text held the end-of-document token itself, written out."""
    bin_sha256: str = ""
    idx_sha256: str = ""
    """Of the two files; empty in manifests that did not know them."""
    encoding_fingerprint: str | None = None
    """What the tokenizer makes of texts, beside its vocabulary; None in manifests that did not know it."""
    tool_version: str = ""
    version: int = MANIFEST_VERSION


def manifest_path(prefix: str) -> Path:
    """Return the manifest's path for the data prefix (the path without .bin or .idx)."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(prefix: str, manifest: Manifest) -> None:
    """Write the manifest in one step: a reader sees the old file or the whole new one."""
    path = manifest_path(prefix)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(asdict(manifest), stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def read_manifest(prefix: str) -> Manifest | None:
    """Read the manifest of a data prefix, None when there is none.

    Fields that this version does not know are left out, so a later minor addition stays readable.

    Raises:
        ConfigError: the file is not a manifest, lacks a field, or is of a later version.
    """
    path = manifest_path(prefix)
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the manifest {path}: {error}") from error
    if not isinstance(content, dict) or type(content.get("version")) is not int:
        raise ConfigError(f"{path} is not a manifest: it has no version number")
    if content["version"] > MANIFEST_VERSION:
        raise ConfigError(
            f"{path} has version {content['version']}, this program reads up to {MANIFEST_VERSION}: update it"
        )
    return _from_json(content, path)


def require_manifest_of(manifest: Manifest, summary: IndexedSummary) -> None:
    """Check that the manifest describes these very files, not an earlier pair of the same name.

    Raises:
        ConfigError: the counts differ.
    """
    for name in ("documents", "sequences", "tokens", "dtype"):
        stated, found = getattr(manifest, name), getattr(summary, name)
        if stated != found:
            raise ConfigError(
                f"{manifest_path(summary.prefix)} belongs to other files: it states {name} {shown(stated)}, "
                f"{summary.prefix}.idx has {found}; preprocess the data again or delete the manifest"
            )


def _from_json(content: dict[str, Any], path: Path) -> Manifest:
    values = _known(Manifest, content)
    wrong = [name for name, is_right in _RULES.items() if name in values and not is_right(values[name])]
    if wrong:
        raise ConfigError(f"{path} is damaged: no proper {', '.join(wrong)}; preprocess the data again")
    try:
        values["sources"] = tuple(SourceFile(**_known(SourceFile, item)) for item in values["sources"])
        subsets: dict[str, dict[str, Any]] = values.get("subsets", {})
        values["subsets"] = {
            name: SubsetCount(**_known(SubsetCount, count)) for name, count in subsets.items()
        }
        for name in ("skipped_examples", "unread_examples"):
            values[name] = tuple(values.get(name, ()))
        return Manifest(**values)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a whole manifest: {shown(str(error), 300)}; preprocess the data again"
        ) from error


def _is_count(value: Any) -> bool:
    """Return whether this is a number that may be counted or an id; -1 is the largest id of no tokens."""
    return type(value) is int and -1 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.isascii()


def _is_text_or_none(value: Any) -> bool:
    return isinstance(value, str | None)


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_sources(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and _is_text(item.get("path", ""))
        and _is_count(item.get("size", 0))
        and _is_text(item.get("sha256", ""))
        for item in value
    )


def _are_subsets(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(item, dict) and _are_counts(_known(SubsetCount, item)) for item in value.values()
    )


_COUNTS = "vocab_size eod max_token_id documents sequences tokens bytes records eod_in_text"
_TEXTS = "tokenizer_type tokenizer_name dtype json_key tool_version shard"
_RULES: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_COUNTS.split(), _is_count),
    **dict.fromkeys(_TEXTS.split(), _is_text),
    **dict.fromkeys(("bin_sha256", "idx_sha256", "shard_of"), _is_digest),
    "append_eod": lambda value: isinstance(value, bool),
    "tokenizer_fingerprint": _is_text_or_none,
    "encoding_fingerprint": _is_text_or_none,
    "subset": _is_text_or_none,
    "sources": _are_sources,
    "skipped": _are_counts,
    "unread": _are_counts,
    "made": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "skipped_examples": _are_texts,
    "unread_examples": _are_texts,
    "subsets": _are_subsets,
}


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a later version may have added."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in content.items() if name in names}
