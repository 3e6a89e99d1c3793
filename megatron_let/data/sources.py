"""Inputs found and checked before any work: what is wrong with one is said in the first second, not after hours."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from io import BufferedReader
from typing import BinaryIO

from megatron_let.data.blocks import RecordKind
from megatron_let.data.decompression import Compression, compression_of, content_chunks
from megatron_let.data.formats import HEAD_BYTES, PARQUET_MAGIC, checked_content, require_readable
from megatron_let.data.input_paths import data_suffix, expand_inputs
from megatron_let.data.input_rules import STANDARD_INPUT, FoundSource, InputRules
from megatron_let.data.parquet import require_parquet
from megatron_let.data.raw_stream import RawStream, open_input, standard_input
from megatron_let.errors import ConfigError

# Little is enough to tell a file's format, and there may be thousands of files.
_PROBE_BYTES = 1 << 13
_EDGE_BYTES = 1 << 20


def find_sources(inputs: Sequence[str], rules: InputRules) -> tuple[FoundSource, ...]:
    """Check the inputs (files, directories, globs, `-`) and return them in the order in which they will be read.

    Raises:
        ConfigError: an input that is absent, no regular file, unreadable, empty, of another format, or there twice.
    """
    paths = expand_inputs(inputs)
    statuses = {path: _status(path) for path in paths if path != STANDARD_INPUT}
    _refuse_same_files([path for path in paths if path != STANDARD_INPUT], statuses)
    sources = tuple(
        _standard_input_source(rules) if path == STANDARD_INPUT else _file_source(path, statuses[path], rules)
        for path in paths
    )
    _refuse_same_contents(sources)
    return sources


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
        raise ConfigError(f"input {path} is empty: leave it out")
    return status


def _refuse_same_files(paths: Iterable[str], statuses: dict[str, os.stat_result]) -> None:
    """Refuse one file under one path or, by links, under several."""
    seen = dict[tuple[int, int], str]()
    for path in paths:
        identity = (statuses[path].st_dev, statuses[path].st_ino)
        if identity in seen:
            other = seen[identity]
            same = "is given twice" if other == path else f"is the same file as {other}"
            raise ConfigError(f"input {path} {same}: its documents would be counted twice; give it once")
        seen[identity] = path


def _standard_input_source(rules: InputRules) -> FoundSource:
    stream = standard_input()
    if rules.input_format == "parquet":
        raise ConfigError("input - cannot be parquet: its table of contents stands at the end; name the file")
    if stream.isatty():
        raise ConfigError("input - is a terminal: pipe data into standard input or name files")
    head = _peek(stream)
    if compression_of(head) is Compression.NONE:
        require_readable(head, "standard input")
    return FoundSource(STANDARD_INPUT, None, 0, _kind(STANDARD_INPUT, rules), is_parquet=False)


def _peek(stream: BinaryIO) -> bytes:
    """Return some of the first bytes without taking them: none only if there are none. Waits for the first."""
    assert isinstance(stream, BufferedReader), "standard input is buffered"
    return stream.peek(HEAD_BYTES)[:HEAD_BYTES]


def _file_source(path: str, status: os.stat_result, rules: InputRules) -> FoundSource:
    with open_input(path) as stream:
        is_parquet = _is_parquet(path, _read(stream, len(PARQUET_MAGIC), path), rules)
        if not is_parquet:
            stream.seek(0)
            raw = RawStream(stream, path, read_bytes=_PROBE_BYTES)
            checked_content(content_chunks(raw), path)
    if is_parquet:
        require_parquet(path)
    kind = RecordKind.JSON_LINES if is_parquet else _kind(path, rules)
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


def _refuse_same_contents(sources: Iterable[FoundSource]) -> None:
    """Refuse copies. Only files of one size are read: first their edges, then whole."""
    for of_one_size in _groups(sources, lambda source: source.size):
        for alike in _groups(of_one_size, _edge_digest):
            for equal in _groups(alike, _whole_digest):
                raise ConfigError(
                    f"inputs {equal[0].path} and {equal[1].path} have the same content: their documents would be "
                    "counted twice; give one of them"
                )


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
