"""PREFIX.map.npy: where each document comes from, int64 [documents, 3].

A row holds the file, by its place in the manifest's `sources` from 0; the record in it, from 1 (the line of JSON lines, the
row of parquet); and the byte at which that begins in the file's content. `numpy.load(path, mmap_mode="r")` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_let.data.growing_file import GrowingFile
from megatron_let.data.manifest import SourceFile
from megatron_let.errors import ConfigError
from megatron_let.plain_json import require_fields

_COLUMNS = 3
_ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class _MapState:
    """How much of a map is on the disk."""

    rows: int
    digest: str


class DocumentMap:
    """A map that grows under a working name."""

    def __init__(self, stem: Path, state: Any = None) -> None:
        """Open the working file; go on from what `sync` returned, if that is given.

        Raises:
            ConfigError: the file does not hold what it says.
            ValueError: it is nothing that `sync` returns.
        """
        path = stem.with_name(f"{stem.name}.places")
        self._stem = stem
        self._rows = 0
        self._file = GrowingFile(path, is_new=state is None or not path.exists())
        if state is not None:
            require_fields(_MapState, state)
            self._rows = state["rows"]
            self._file.cut_back(self._rows * _COLUMNS * 8, state["digest"])

    def add(self, source: int, places: bytes) -> None:
        """Append documents of one file. places: int64 [documents, 2], record and byte."""
        known = np.frombuffer(places, dtype=np.int64).reshape(-1, 2)
        self._file.write(np.insert(known, 0, source, axis=1).tobytes())
        self._rows += len(known)

    def sync(self) -> dict[str, Any]:
        """Bring everything to the disk and return, in JSON values, what is there."""
        return {"rows": self._rows, "digest": self._file.sync()}

    def complete(self) -> None:
        """Write STEM.map.npy and close the working file, which stays."""
        write_map(self._stem, self._rows, self._file.blocks())
        self.close()

    def close(self) -> None:
        """Close the working file, which stays."""
        self._file.close()


def map_path(prefix: str) -> Path:
    """Return the path of the map that belongs to a data prefix."""
    return Path(f"{prefix}.map.npy")


def write_map(stem: Path, rows: int, blocks: Iterable[bytes]) -> None:
    """Write STEM.map.npy of its rows back to back."""
    with map_path(str(stem)).open("wb") as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": (rows, _COLUMNS)}
        np.lib.format.write_array_header_1_0(stream, header)
        for block in blocks:
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())


def open_map(prefix: str, documents: int) -> Any:
    """Return the map of a pair, int64 [documents, 3], not read into memory; None where there is none.

    Raises:
        ConfigError: it is damaged, or of other files.
    """
    path = map_path(prefix)
    if not path.exists():
        return None
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read the document map {path}: {error}; delete it") from error
    if rows.shape != (documents, _COLUMNS) or rows.dtype != np.int64:
        raise ConfigError(
            f"{path} belongs to other files: it has not a row for each of {documents} documents; delete it"
        )
    return rows


def merged_rows(maps: Sequence[Any], sources: Sequence[Sequence[SourceFile]]) -> Iterator[bytes]:
    """Yield the rows of several pairs as those of one, whose sources are theirs, each once, in order."""
    places: dict[SourceFile, int] = {}
    for rows, own in zip(maps, sources, strict=True):
        new = np.array([places.setdefault(source, len(places)) for source in own], dtype=np.int64)
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = np.array(rows[first : first + _ROWS_AT_ONCE])
            part[:, 0] = new[part[:, 0]]
            yield part.tobytes()
