"""Writes a pair of token files as a stream that can be taken up again; memory does not grow with the data.

The bytes are those of megatron.core's IndexedDatasetBuilder. A pair grows under a working name, STEM.bin with
STEM.lengths and STEM.bounds beside it; `complete` makes STEM.idx of the tables, `install_pair` renames. A run killed
at any moment leaves under the final name the old pair, no index (which every loader refuses) or the new pair, never
an old index beside new tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_let.data.document_map import map_path
from megatron_let.data.growing_file import GrowingFile, damaged
from megatron_let.data.indexed import BOUND_BYTES, CODE_OF_DTYPE, HEADER, LENGTH_BYTES, MAGIC, VERSION
from megatron_let.data.manifest import manifest_path
from megatron_let.errors import ConfigError


@dataclass(frozen=True)
class WriterState:
    """How much of a pair is safely on disk: where a killed run's files are cut before it goes on."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    digests: Sequence[str] = ()
    """SHA-256 of the tokens, the lengths and the bounds so far, hex."""


class IndexedWriter:
    """Writes one pair under a working name; takes up what `state` says is there."""

    def __init__(self, stem: Path, dtype: str, state: WriterState | None = None) -> None:
        """Open the working files.

        Raises:
            ConfigError: `state` is given and the files do not hold what it says.
        """
        self.stem = stem
        self.dtype = np.dtype(dtype)
        self.documents = self.sequences = self.tokens = 0
        paths = [working_file(stem, kind) for kind in ("bin", "lengths", "bounds")]
        for path in paths if state else ():
            if not path.exists():
                raise damaged(path)
        self._data, self._lengths, self._bounds = (GrowingFile(path, is_new=not state) for path in paths)
        if state:
            try:
                self._take_up(state)
            except ConfigError:
                self.close()
                raise

    def add_documents(self, tokens: bytes, lengths: bytes, sequence_counts: bytes) -> None:
        """Append whole documents.

        tokens: ids in the writer's dtype, back to back. lengths: int32 [sequences], in tokens.
        sequence_counts: int32 [documents], how many of those sequences each document has.
        """
        length_array = np.frombuffer(lengths, dtype=np.int32)
        count_array = np.frombuffer(sequence_counts, dtype=np.int32)
        assert int(length_array.sum(dtype=np.int64)) * self.dtype.itemsize == len(tokens), (
            "lengths do not add up to the tokens"
        )
        assert int(count_array.sum(dtype=np.int64)) == len(length_array), (
            "counts do not add up to the sequences"
        )
        self.add_bounds(np.cumsum(count_array, dtype=np.int64))
        self.add_lengths(length_array)
        self.add_tokens(tokens)

    def add_tokens(self, tokens: bytes) -> None:
        """Append ids only; their lengths and bounds are for the caller to add."""
        self._data.write(tokens)
        self.tokens += len(tokens) // self.dtype.itemsize

    def add_bounds(self, bounds: Any) -> None:
        """Append documents by where each ends: int64 [documents], in sequences after those that are there already."""
        self._bounds.write((self.sequences + bounds).tobytes())
        self.documents += len(bounds)

    def add_lengths(self, lengths: Any) -> None:
        """Append sequences: int32 [sequences], in tokens."""
        self._lengths.write(lengths.tobytes())
        self.sequences += len(lengths)

    def sync(self) -> WriterState:
        """Bring everything to the disk and return what is there."""
        digests = [part.sync() for part in (self._data, self._lengths, self._bounds)]
        return WriterState(self.documents, self.sequences, self.tokens, digests)

    def complete(self) -> tuple[str, str]:
        """Write STEM.idx and return the SHA-256 of .bin and .idx (hex).

        The tables stay: a run killed before all its pairs are complete takes them up again.
        """
        state = self.sync()
        index_hash = hashlib.sha256()
        with working_file(self.stem, "idx").open("wb") as index:
            for part in self._index_parts():
                index.write(part)
                index_hash.update(part)
            index.flush()
            os.fsync(index.fileno())
        self.close()
        return state.digests[0], index_hash.hexdigest()

    def close(self) -> None:
        """Close the working files, which stay."""
        for part in (self._data, self._lengths, self._bounds):
            part.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_up(self, state: WriterState) -> None:
        """Cut the files back to `state` and check that they hold what was written."""
        sizes = (
            state.tokens * self.dtype.itemsize,
            state.sequences * LENGTH_BYTES,
            state.documents * BOUND_BYTES,
        )
        parts = (self._data, self._lengths, self._bounds)
        for part, size, digest in zip(parts, sizes, state.digests, strict=True):
            part.cut_back(size, digest)
        self.documents, self.sequences, self.tokens = state.documents, state.sequences, state.tokens

    def _index_parts(self) -> Iterator[bytes]:
        code = CODE_OF_DTYPE[self.dtype.name]
        yield HEADER.pack(MAGIC, VERSION, code, self.sequences, self.documents + 1)
        yield from self._lengths.blocks()
        offset = 0
        for block in self._lengths.blocks():
            ends = np.cumsum(np.frombuffer(block, dtype=np.int32), dtype=np.int64) * self.dtype.itemsize
            yield (np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]) + offset).tobytes()
            offset += int(ends[-1])
        yield bytes(BOUND_BYTES)
        yield from self._bounds.blocks()


def write_pair(prefix: str, dtype: str, parts: Iterable[tuple[Any, Any, Any]]) -> None:
    """Write PREFIX.bin and PREFIX.idx of the parts, each as `IndexedWriter.add_documents` takes it."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    stem = Path(f"{prefix}.partial")
    try:
        with IndexedWriter(stem, dtype) as writer:
            for part in parts:
                writer.add_documents(*part)
            writer.complete()
        install_pair(stem, prefix)
    finally:
        remove_working_files(stem)


def install_pair(stem: Path, prefix: str) -> None:
    """Put a completed pair under its name; what a kill left undone is done by the next call.

    The old index goes first, then the old manifest and map; then come the new tokens, the index, and the map and the
    manifest if there are any (STEM.map.npy, STEM.manifest.json).
    """
    data, index = working_file(stem, "bin"), working_file(stem, "idx")
    if data.exists():
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        manifest_path(prefix).unlink(missing_ok=True)
        map_path(prefix).unlink(missing_ok=True)
        data.replace(f"{prefix}.bin")
    if index.exists():
        index.replace(f"{prefix}.idx")
    if (document_map := map_path(str(stem))).exists():
        document_map.replace(map_path(prefix))
    if (manifest := manifest_path(str(stem))).exists():
        manifest.replace(manifest_path(prefix))
    _sync_directory(Path(prefix).parent)


def remove_working_files(stem: Path) -> None:
    """Delete whatever a writer left under the working name."""
    for kind in ("bin", "idx", "lengths", "bounds", "map.npy", "manifest.json"):
        working_file(stem, kind).unlink(missing_ok=True)


def working_file(stem: Path, kind: str) -> Path:
    """Return the path of one working file of a pair."""
    return stem.with_name(f"{stem.name}.{kind}")


def _sync_directory(directory: Path) -> None:
    """Make renames last; not every file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
