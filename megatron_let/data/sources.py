"""Inputs found and checked before any work: what is wrong with one is said in the first second, not after hours."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from typing import BinaryIO

from megatron_let.data.blocks import RecordKind
from megatron_let.data.decompression import Compression, compression_of, content_chunks
from megatron_let.data.formats import HEAD_BYTES, PARQUET_MAGIC, EmptyInput, checked_content, require_readable
from megatron_let.data.input_paths import InputPath, data_suffix, expand_inputs
from megatron_let.data.input_rules import STANDARD_INPUT, FoundSource, InputRules, UnreadFile
from megatron_let.data.parquet import require_parquet
from megatron_let.data.raw_stream import RawStream, open_input, standard_input
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER

# Little is enough to tell a file's format, and there may be thousands of files.
_PROBE_BYTES = 1 << 13
_EDGE_BYTES = 1 << 20
EMPTY = "empty"
SAME_FILE = "same_file"
SAME_CONTENT = "same_content"


@dataclass(frozen=True)
class FoundInputs:
    """What will be read, in that order, and what is left out of directories and globs."""

    sources: tuple[FoundSource, ...]
    unread: tuple[UnreadFile, ...]


def find_sources(inputs: Sequence[str], rules: InputRules) -> tuple[FoundSource, ...]:
    """Return the sources alone, see `find_inputs`."""
    return find_inputs(inputs, rules).sources


def find_inputs(inputs: Sequence[str], rules: InputRules) -> FoundInputs:
    """Check the inputs (files, directories, globs, `-`). Of those found in directories and by globs the empty ones, and all
    but the first of equal ones, are left out; a line in the log tells of all that is.

    Raises:
        ConfigError: an input that is absent, no regular file, unreadable or of another format; one given by its name that is
            empty or there twice; nothing is left.
    """
    expanded = expand_inputs(inputs)
    unread = list(expanded.unread)
    statuses: list[tuple[InputPath, os.stat_result | None]] = []
    for item in expanded.paths:
        with _leaving_out_empty(item, unread):
            statuses.append((item, None if item.path == STANDARD_INPUT else _status(item.path)))
    named: set[str] = set()
    sources: list[FoundSource] = []
    for item, status in _without_same_files(statuses, unread):
        with _leaving_out_empty(item, unread):
            sources.append(
                _standard_input_source(rules) if status is None else _file_source(item.path, status, rules)
            )
            named |= {item.path} if item.is_named else set()
    sources = _without_copies(sources, named, unread)
    if not sources:
        raise ConfigError(f"--input {' '.join(inputs)}: all files are empty")
    _tell_of(unread)
    return FoundInputs(tuple(sources), tuple(unread))


def counted_by_reason(unread: Iterable[UnreadFile]) -> dict[str, int]:
    """Return how many files are left out for each reason."""
    return dict(sorted(Counter(file.reason for file in unread).items()))


def _tell_of(unread: Sequence[UnreadFile]) -> None:
    first = dict[str, str]()
    for file in unread:
        first.setdefault(file.reason, file.path)
    if unread:
        counts = counted_by_reason(unread)
        words = ", ".join(f"{count:,} {reason} ({first[reason]})" for reason, count in counts.items())
        LOGGER.warning("%s files of the input are not read: %s", f"{len(unread):,}", words)


@contextmanager
def _leaving_out_empty(item: InputPath, unread: list[UnreadFile]) -> Iterator[None]:
    try:
        yield
    except EmptyInput:
        if item.is_named:
            raise
        unread.append(UnreadFile(item.path, EMPTY))


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ConfigError(f"input {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read input {path}: {error}") from error
    if stat.S_ISFIFO(status.st_mode):
        # Opening it would wait for ever if nobody writes.
        raise ConfigError(
            f"input {path} is a pipe: give - as the input and pipe the data into standard input"
        )
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(
            f"input {path} is not a regular file: give files, directories or - for standard input"
        )
    if not status.st_size:
        raise EmptyInput(path)
    return status


def _without_same_files(
    items: Iterable[tuple[InputPath, os.stat_result | None]], unread: list[UnreadFile]
) -> Iterator[tuple[InputPath, os.stat_result | None]]:
    """Yield one file once, be it there under one path or, by links, under several. Refuse it where it is named."""
    seen = dict[tuple[int, int], InputPath]()
    for item, status in items:
        other = seen.setdefault((status.st_dev, status.st_ino), item) if status else item
        if other is item:
            yield item, status
        elif item.is_named or other.is_named:
            same = "is given twice" if other.path == item.path else f"is the same file as {other.path}"
            raise ConfigError(f"input {item.path} {same}: its documents would be counted twice; give it once")
        else:
            unread.append(UnreadFile(item.path, SAME_FILE))


def _standard_input_source(rules: InputRules) -> FoundSource:
    stream = standard_input()
    if rules.input_format == "parquet":
        raise ConfigError("input - cannot be parquet: its table of contents stands at the end; name the file")
    if stream.isatty():
        raise ConfigError("input - is a terminal: pipe data into standard input or name files")
    head, kind = _peek(stream), _kind(STANDARD_INPUT, rules)
    if compression_of(head) is Compression.NONE:
        require_readable(head, "standard input", is_json=kind is RecordKind.JSON_LINES)
    return FoundSource(STANDARD_INPUT, None, 0, kind, is_parquet=False)


def _peek(stream: BinaryIO) -> bytes:
    """Return some of the first bytes without taking them: none only if there are none. Waits for the first."""
    assert isinstance(stream, BufferedReader), "standard input is buffered"
    return stream.peek(HEAD_BYTES)[:HEAD_BYTES]


def _file_source(path: str, status: os.stat_result, rules: InputRules) -> FoundSource:
    kind = _kind(path, rules)
    with open_input(path) as stream:
        is_parquet = _is_parquet(path, _read(stream, len(PARQUET_MAGIC), path), rules)
        if not is_parquet:
            stream.seek(0)
            raw = RawStream(stream, path, read_bytes=_PROBE_BYTES)
            checked_content(content_chunks(raw), path, is_json=kind is RecordKind.JSON_LINES)
    if is_parquet:
        require_parquet(path)
        kind = RecordKind.JSON_LINES
    return FoundSource(path, status.st_size, status.st_mtime_ns, kind, is_parquet)


def _is_parquet(path: str, head: bytes, rules: InputRules) -> bool:
    is_meant = rules.input_format == "parquet" or (
        rules.input_format == "auto" and data_suffix(path) == ".parquet"
    )
    if head == PARQUET_MAGIC and rules.input_format not in ("auto", "parquet"):
        raise ConfigError(
            f"input {path} is a parquet file and not {rules.input_format}: give auto or parquet as the input format"
        )
    if head != PARQUET_MAGIC and is_meant:
        raise ConfigError(
            f"input {path} is not a parquet file: it does not begin with PAR1; get it again, or leave it out"
        )
    return head == PARQUET_MAGIC


def _kind(path: str, rules: InputRules) -> RecordKind:
    is_text = rules.input_format == "text" or (rules.input_format == "auto" and data_suffix(path) == ".txt")
    if not is_text:
        return RecordKind.JSON_LINES
    return RecordKind.TEXT_FILE if rules.text_documents == "file" else RecordKind.TEXT_LINES


def _without_copies(
    sources: Sequence[FoundSource], named: set[str], unread: list[UnreadFile]
) -> list[FoundSource]:
    """Return the first of those with equal content. Only files of one size are read: first their edges, then whole.

    Raises:
        ConfigError: one of the equal ones was given by its name.
    """
    copies = set[str]()
    for of_one_size in _groups(sources, lambda source: source.size):
        for alike in _groups(of_one_size, _edge_digest):
            for equal in _groups(alike, _whole_digest):
                paths = [source.path for source in equal]
                if not named.isdisjoint(paths):
                    raise ConfigError(
                        f"inputs {paths[0]} and {paths[1]} have the same content: their documents would be counted "
                        "twice; give one of them"
                    )
                copies.update(paths[1:])
    unread += [UnreadFile(source.path, SAME_CONTENT) for source in sources if source.path in copies]
    return [source for source in sources if source.path not in copies]


def _groups(
    sources: Iterable[FoundSource], key: Callable[[FoundSource], Hashable]
) -> Iterator[list[FoundSource]]:
    """Yield those that share a key with another."""
    groups = defaultdict[Hashable, list[FoundSource]](list)
    for source in sources:
        if source.size is not None:
            groups[key(source)].append(source)
    yield from (group for group in groups.values() if len(group) > 1)


def _edge_digest(source: FoundSource) -> bytes:
    with open_input(source.path) as stream:
        digest = hashlib.sha256(_read(stream, _EDGE_BYTES, source.path))
        stream.seek(max(0, (source.size or 0) - _EDGE_BYTES))
        digest.update(_read(stream, _EDGE_BYTES, source.path))
    return digest.digest()


def _whole_digest(source: FoundSource) -> bytes:
    digest = hashlib.sha256()
    with open_input(source.path) as stream:
        while piece := _read(stream, _EDGE_BYTES, source.path):
            digest.update(piece)
    return digest.digest()


def _read(stream: BinaryIO, size: int, path: str) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:
        raise ConfigError(f"cannot read input {path}: {error.strerror}") from error
