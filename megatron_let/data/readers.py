"""Found inputs to blocks of whole records. Only blocks travel on, so memory stays bounded by block and longest record."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_let.data.blocks import START, Block, Position, RecordKind
from megatron_let.data.decompression import content_chunks
from megatron_let.data.formats import checked_content
from megatron_let.data.input_rules import FoundSource, InputRules
from megatron_let.data.line_blocks import Piece, cut_lines, whole_text
from megatron_let.data.parquet import read_parquet_blocks
from megatron_let.data.raw_stream import READ_BYTES, RawStream, changed_since_start, open_input
from megatron_let.errors import ConfigError


def read_blocks(
    source: FoundSource, rules: InputRules, start: Position = START, *, read_bytes: int = READ_BYTES
) -> Iterator[Block]:
    """Yield the source's blocks after `start`; the last, and only that, has `is_last`.

    `start` is the end of any block of an earlier run. What lies before it is read again, compared by its digest and
    left out, before the first block comes. `read_bytes` is the size of one read: positions depend on it.

    Raises:
        ConfigError: the source cannot be read, is not what it was, is of another format, or its data is damaged.
    """
    if source.is_parquet:
        yield from read_parquet_blocks(source, rules, start)
        return
    with open_input(source.path) as stream:
        raw = RawStream(stream, source.name, size=source.size, start=start, read_bytes=read_bytes)
        try:
            yield from _once_verified(_blocks(source, rules, raw, start), raw)
        except ConfigError:
            # Another file than before is the cause rather than any damage found in it.
            raw.verify_rest()
            raise


def _once_verified(blocks: Iterator[Block], raw: RawStream) -> Iterator[Block]:
    """Yield the blocks as soon as all that an earlier run had read is compared, not one before."""
    held = list[Block]()
    for block in blocks:
        held.append(block)
        if raw.is_verified:
            yield from held
            held.clear()


def _blocks(source: FoundSource, rules: InputRules, raw: RawStream, start: Position) -> Iterator[Block]:
    records, content_bytes = start.records, start.content_bytes
    for piece in _pieces(source, rules, raw, start):
        end = Position(
            records=records + piece.num_records,
            content_bytes=content_bytes + piece.num_bytes,
            disk_bytes=raw.position,
            digest=raw.digest(),
        )
        yield Block(
            path=source.path,
            kind=source.kind,
            first_record=records + 1,
            first_byte=content_bytes,
            content=piece.content,
            too_long=piece.dropped_bytes > 0,
            is_last=piece.is_last,
            end=end,
        )
        records, content_bytes = end.records, end.content_bytes


def _pieces(source: FoundSource, rules: InputRules, raw: RawStream, start: Position) -> Iterator[Piece]:
    content = checked_content(content_chunks(raw), source.name, is_json=source.kind is RecordKind.JSON_LINES)
    rest = _skip(content, start.content_bytes, source.name)
    if source.kind is RecordKind.TEXT_FILE:
        yield whole_text(rest, rules.max_document_bytes)
    else:
        yield from cut_lines(rest, rules.block_bytes, rules.max_document_bytes)


def _skip(chunks: Iterator[bytes], size: int, name: str) -> Iterator[bytes]:
    for chunk in chunks:
        if size < len(chunk):
            yield chunk[size:]
        size = max(0, size - len(chunk))
    if size:
        raise changed_since_start(name)
