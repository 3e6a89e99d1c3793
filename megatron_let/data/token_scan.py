"""One pass over PREFIX.bin: the range of ids, the ends of documents, the checksum. Memory does not grow with the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_let.data.byte_progress import ByteProgress
from megatron_let.data.index_tables import IndexTables
from megatron_let.regular_files import open_regular

_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Searched:
    """What a pass looks for."""

    vocab_size: int | None
    """Ids from here on are out of range; None: only negative ones are."""
    eod: int | None
    """None: ends of documents are not looked at."""


@dataclass
class TokenScan:
    """What a pass found, growing while it goes. Positions are tokens from the start of the file."""

    searched: Searched
    largest: int = -1
    outside: tuple[int, int] | None = None
    """Position and id of the first id out of range."""
    eods: int = 0
    filled_documents: int = 0
    """Documents that hold tokens."""
    ended_documents: int = 0
    """Those whose last token is eod."""
    first_unended: int | None = None
    """Position of the last token of the first that does not end so."""
    sha256: str = ""

    def add(self, position: int, ids: Any, ends: Any) -> None:
        """Count a block: `ids` [n] from `position` on, `ends` the positions of documents' last tokens among them."""
        lowest, highest = int(ids.min()), int(ids.max())
        self.largest = max(self.largest, highest)
        limit = self.searched.vocab_size
        is_outside = lowest < 0 or (limit is not None and highest >= limit)
        if is_outside and self.outside is None:
            wrong = ids < 0 if limit is None else (ids < 0) | (ids >= limit)
            first = int(np.argmax(wrong))
            self.outside = (position + first, int(ids[first]))
        if self.searched.eod is None:
            return
        self.eods += int((ids == self.searched.eod).sum())
        is_ended = ids[ends - position] == self.searched.eod
        self.filled_documents += len(ends)
        self.ended_documents += int(is_ended.sum())
        if self.first_unended is None and not is_ended.all():
            self.first_unended = int(ends[np.argmin(is_ended)])


def scan_tokens(tables: IndexTables, searched: Searched, progress: ByteProgress) -> TokenScan:
    """Read all tokens of a pair whose tables are whole (with `eod` None: whose sizes are)."""
    scan, digest = TokenScan(searched), hashlib.sha256()
    all_ends = _last_tokens(tables) if searched.eod is not None else iter(())
    waiting = np.empty(0, dtype=np.int64)
    position = 0
    with open_regular(f"{tables.prefix}.bin") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            ids = np.frombuffer(block, dtype=tables.header.dtype)
            stop = position + len(ids)
            while not len(waiting) or waiting[-1] < stop:
                more = next(all_ends, None)
                if more is None:
                    break
                waiting = np.concatenate([waiting, more])
            count = int(np.searchsorted(waiting, stop))
            scan.add(position, ids, waiting[:count])
            waiting, position = waiting[count:], stop
            progress.add(len(block))
    scan.sha256 = digest.hexdigest()
    return scan


def _last_tokens(tables: IndexTables) -> Iterator[Any]:
    """Yield the position of each document's last token, documents without tokens left out."""
    before = 0
    for ends in tables.document_ends():
        yield ends[np.diff(ends, prepend=before) > 0] - 1
        before = int(ends[-1])
