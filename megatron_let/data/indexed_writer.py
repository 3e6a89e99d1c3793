"""Writes PREFIX.bin and PREFIX.idx as a stream: memory does not grow with the number of documents.

The bytes are those of megatron.core's IndexedDatasetBuilder. Everything goes to `.partial` files first. On finish
the old index is removed, then .bin and .idx are renamed in that order: a run killed at any moment leaves the old
pair, no index (which every loader refuses), or the new pair, never an old index beside new tokens.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_let.data.indexed import BOUND_BYTES, CODE_OF_DTYPE, HEADER, LENGTH_BYTES, MAGIC, VERSION
from megatron_let.data.manifest import manifest_path

# Lengths read back at a time when pointers are made from them.
_CHUNK_SEQUENCES = 1 << 20


class IndexedWriter:
    """Writes one pair of files; leaving the `with` block without `finish` removes what was written."""

    def __init__(self, prefix: str, dtype: str) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.documents = 0
        self.sequences = 0
        self.tokens = 0
        self._data_path, self._index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._data_path.parent.mkdir(parents=True, exist_ok=True)
        self._data = _partial(self._data_path).open("wb")
        self._index = _partial(self._index_path).open("w+b")
        # Bounds come after the pointers, whose number is known only at the end. A file without a name: no litter.
        self._bounds = tempfile.TemporaryFile(dir=self._data_path.parent)  # noqa: SIM115 (closed in __exit__)
        self._index.write(bytes(HEADER.size))
        self._bounds.write(bytes(BOUND_BYTES))
        self._finished = False

    def add_documents(self, tokens: bytes, lengths: bytes, sequence_counts: bytes) -> None:
        """Append whole documents.

        tokens: ids in the writer's dtype, back to back. lengths: int32 [sequences], in tokens.
        sequence_counts: int32 [documents], how many of those sequences each document has.
        """
        length_array = np.frombuffer(lengths, dtype=np.int32)
        count_array = np.frombuffer(sequence_counts, dtype=np.int32)
        num_tokens = len(tokens) // self.dtype.itemsize
        assert int(length_array.sum(dtype=np.int64)) == num_tokens, "lengths do not add up to the tokens"
        assert int(count_array.sum(dtype=np.int64)) == len(length_array), (
            "counts do not add up to the sequences"
        )
        self._data.write(tokens)
        self._index.write(lengths)
        self._bounds.write((self.sequences + np.cumsum(count_array, dtype=np.int64)).tobytes())
        self.documents += len(count_array)
        self.sequences += len(length_array)
        self.tokens += num_tokens

    def finish(self) -> None:
        """Complete the index and put both files under their names; the old manifest goes after the old index."""
        self._write_pointers()
        self._bounds.seek(0)
        shutil.copyfileobj(self._bounds, self._index)
        self._index.seek(0)
        code = CODE_OF_DTYPE[self.dtype.name]
        self._index.write(HEADER.pack(MAGIC, VERSION, code, self.sequences, self.documents + 1))
        for stream in (self._data, self._index):
            stream.flush()
            os.fsync(stream.fileno())
        self._close()
        self._index_path.unlink(missing_ok=True)
        manifest_path(self.prefix).unlink(missing_ok=True)
        _partial(self._data_path).replace(self._data_path)
        _partial(self._index_path).replace(self._index_path)
        self._finished = True

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if not self._finished:
            _partial(self._data_path).unlink(missing_ok=True)
            _partial(self._index_path).unlink(missing_ok=True)

    def _write_pointers(self) -> None:
        """Append each sequence's byte offset, made from the lengths already in the file, chunk by chunk."""
        offset = 0
        for start in range(0, self.sequences, _CHUNK_SEQUENCES):
            count = min(_CHUNK_SEQUENCES, self.sequences - start)
            ends = np.cumsum(self._read_lengths(start, count), dtype=np.int64) * self.dtype.itemsize
            pointers = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]) + offset
            self._index.seek(0, os.SEEK_END)
            self._index.write(pointers.tobytes())
            offset += int(ends[-1])
        self._index.seek(0, os.SEEK_END)

    def _read_lengths(self, start: int, count: int) -> Any:
        self._index.seek(HEADER.size + LENGTH_BYTES * start)
        return np.frombuffer(self._index.read(LENGTH_BYTES * count), dtype=np.int32)

    def _close(self) -> None:
        for stream in (self._data, self._index, self._bounds):
            stream.close()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
