"""Parquet files as blocks of JSON lines, a row a line, so that their records go the way of all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import orjson

from megatron_let.data.blocks import START, Block, Position
from megatron_let.data.formats import EmptyInput
from megatron_let.data.input_rules import FoundSource, InputRules
from megatron_let.data.raw_stream import RawStream, changed_since_start, open_input
from megatron_let.errors import ConfigError
from megatron_let.optional import has_pyarrow

_BUFFER_BYTES = 1 << 20
# Rows that are decoded at once. Nothing in the file tells a row's size before: a dictionary holds a text of megabytes
# once for any number of rows. More than a few gain nothing but for rows of some bytes.
_MAX_BATCH_ROWS = 32


def require_parquet(path: str) -> None:
    """Check that the file's metadata can be read and tells of rows.

    Raises:
        EmptyInput: it has no rows.
        ConfigError: the package pyarrow is missing, or the file is damaged.
    """
    if not has_pyarrow():
        raise ConfigError(
            f"input {path} is a parquet file: install the package pyarrow or convert it to JSON lines"
        )
    with open_input(path) as stream, _damage_named(path):
        num_rows = _open(stream).metadata.num_rows
    if not num_rows:
        raise EmptyInput(path, ", a parquet file without rows")


def read_parquet_blocks(source: FoundSource, rules: InputRules, start: Position = START) -> Iterator[Block]:
    """Yield the rows after `start` as JSON lines. The whole file is hashed before the first block comes.

    Raises:
        ConfigError: the file cannot be read, is damaged, or is not the one that `start` was taken from.
    """
    with open_input(source.path) as stream:
        raw = RawStream(stream, source.name, size=source.size)
        while raw.read():
            pass
        digest = raw.digest()
        if start != START and start.digest != digest:
            raise changed_since_start(source.name)
        with _damage_named(source.name):
            file = _open(stream)
        yield from _blocks(source, rules, file, start, digest)


def _blocks(
    source: FoundSource, rules: InputRules, file: Any, start: Position, digest: str
) -> Iterator[Block]:
    """Gather lines into blocks. A row that is too long ends the block before it and takes one of its own."""
    num_rows, size = file.metadata.num_rows, source.size or 0
    lines, gathered, before = list[bytes](), 0, start

    def block(kept: Sequence[bytes], dropped: int = 0, is_last: bool = False) -> Block:
        content = b"".join(kept)
        records = before.records + len(kept) + bool(dropped)
        end = Position(
            records=records,
            content_bytes=before.content_bytes + len(content) + dropped,
            disk_bytes=size if is_last else size * records // num_rows,
            digest=digest,
        )
        first = (before.records + 1, before.content_bytes)
        return Block(source.path, source.kind, *first, content, dropped > 0, is_last, end)

    for line in _lines(source.name, file, rules, start.records):
        is_too_long = len(line) - 1 > rules.max_document_bytes
        if lines and (is_too_long or gathered + len(line) > rules.block_bytes):
            yield (done := block(lines))
            lines, gathered, before = [], 0, done.end
        if is_too_long:
            yield (done := block([], dropped=len(line)))
            before = done.end
        else:
            lines.append(line)
            gathered += len(line)
    yield block(lines, is_last=True)


def _lines(name: str, file: Any, rules: InputRules, skip: int) -> Iterator[bytes]:
    """Yield the rows after the first `skip` as JSON lines, their newlines included."""
    columns = [column for column in rules.columns if column in file.schema_arrow.names]
    groups, skip = _groups_after(file.metadata, skip)
    with _damage_named(name):
        num_rows = 1
        for batch in file.iter_batches(
            batch_size=num_rows, row_groups=groups, columns=columns, use_threads=False
        ):
            # The next batch then has that many rows: fewer at once where rows are large, slowly more where not.
            num_rows = _next_batch_rows(num_rows, batch.nbytes, rules.block_bytes)
            file.reader.set_batch_size(num_rows)
            if skip < batch.num_rows:
                yield from _batch_lines(batch.slice(skip), columns)
            skip = max(0, skip - batch.num_rows)


def _groups_after(metadata: Any, skip: int) -> tuple[list[int], int]:
    """Return the row groups that hold rows after the first `skip`, and how many of theirs are still to be skipped."""
    first = 0
    while first < metadata.num_row_groups and metadata.row_group(first).num_rows <= skip:
        skip -= metadata.row_group(first).num_rows
        first += 1
    return list(range(first, metadata.num_row_groups)), skip


def _next_batch_rows(num_rows: int, num_bytes: int, block_bytes: int) -> int:
    """Return how many rows to decode next, after a batch of that many rows and bytes."""
    if num_bytes > block_bytes:
        return max(1, num_rows * block_bytes // num_bytes)
    return min(_MAX_BATCH_ROWS, 2 * num_rows)


def _batch_lines(batch: Any, columns: Sequence[str]) -> Iterator[bytes]:
    values = [_values(batch.column(column)) for column in columns]
    for row in zip(*values, strict=True) if columns else [()] * batch.num_rows:
        yield _line(dict(zip(columns, row, strict=True)))


def _values(array: Any) -> list[Any]:
    """Return a column's values: text as bytes, because a file may hold some that is not UTF-8."""
    import pyarrow
    from pyarrow import types

    kind = array.type.value_type if types.is_dictionary(array.type) else array.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return array.cast(pyarrow.large_binary()).to_pylist()
    if types.is_temporal(kind):
        return array.cast(pyarrow.string()).to_pylist()
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_value_or_undecodable(scalar) for scalar in array]


def _value_or_undecodable(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object


def _line(record: dict[str, Any]) -> bytes:
    """Return a JSON line. Bytes that are not UTF-8 are put into it as they are: the reader of the line then says so."""
    try:
        decoded = {
            key: value.decode() if isinstance(value, bytes) else value for key, value in record.items()
        }
        return orjson.dumps(decoded, default=_jsonable, option=orjson.OPT_APPEND_NEWLINE)
    except UnicodeDecodeError as error:
        return _undecodable_line(error.object)
    except orjson.JSONEncodeError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        return _undecodable_line(error.__cause__.object)


def _undecodable_line(value: bytes) -> bytes:
    return b'{"undecodable": "' + value.replace(b"\n", b" ") + b'"}\n'


def _jsonable(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _open(stream: BinaryIO) -> Any:
    """Return the file for reading page by page: pre-buffering would hold whole row groups."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn what pyarrow raises into one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"input {name} is a damaged parquet file, or one of a kind that cannot be read: {reason}"
        ) from error
