"""What travels from the reading process to the encoding workers: whole records of one source, and where they end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum


class RecordKind(Enum):
    """How a block's content is cut into records."""

    JSON_LINES = "json_lines"
    """One JSON object a line."""
    TEXT_LINES = "text_lines"
    """One document a line."""
    TEXT_FILE = "text_file"
    """The content is one document."""


@dataclass(frozen=True)
class Position:
    """How far a source has been read when a block ends: enough to go on from there, and to notice a changed file."""

    records: int
    """Records read, blank and unusable ones included."""
    content_bytes: int
    """Bytes of content, after decompression."""
    disk_bytes: int
    """Bytes read of the file itself; for a parquet file the share of its size that the rows read make up."""
    digest: str
    """SHA-256 of those `disk_bytes`, hex; for a parquet file of the whole file."""


START = Position(records=0, content_bytes=0, disk_bytes=0, digest="")


@dataclass
class Block:
    """Whole records of one source, in order."""

    path: str
    kind: RecordKind
    first_record: int
    """Number of the first record in its source, from 1: the line number of JSON lines."""
    first_byte: int
    """Where `content` begins in the source's content."""
    content: bytes
    """Empty when the block carries only a record that was too long, or only the end of the source, and once it is
    encoded."""
    too_long: bool
    """The block stands for one record above the limit, which was read past and not kept."""
    is_last: bool
    """The source ends with this block; `end.digest` is then the digest of the whole file."""
    end: Position

    @property
    def num_records(self) -> int:
        """Return how many records it stands for."""
        return self.end.records - self.first_record + 1


def first_records(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """Yield the blocks of the first `count` records, the last of them cut."""
    while count > 0 and (block := next(blocks, None)):
        yield block if block.num_records <= count else _beginning(block, count)
        count -= block.num_records


def _beginning(block: Block, count: int) -> Block:
    """Return a block of several records, which are lines, with the first `count` of them."""
    size = 0
    for _ in range(count):
        size = block.content.index(b"\n", size) + 1
    end = replace(block.end, records=block.first_record - 1 + count, content_bytes=block.first_byte + size)
    return replace(block, content=block.content[:size], is_last=False, end=end)
