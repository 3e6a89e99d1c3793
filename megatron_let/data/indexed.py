"""Megatron's indexed token files: PREFIX.bin holds ids back to back, PREFIX.idx says where sequences lie.

Layout of PREFIX.idx, little-endian, nothing aligned:
    9 bytes magic, u64 version (1), u8 id type, u64 S sequences, u64 D document bounds,
    i32 [S] lengths in tokens, i64 [S] byte offsets in .bin, i64 [D] first sequence of each document, last S.
Source: the reader and writer in megatron.core.datasets.indexed_dataset; written here anew, and without
multimodal modes. GPT-NeoX writes the same ("mmap"). A loader that maps a damaged pair reads wrong tokens or dies far from the cause, hence the checks.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_let.errors import ConfigError
from megatron_let.regular_files import open_regular

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
LENGTH_BYTES, POINTER_BYTES, BOUND_BYTES = 4, 8, 8

# Only the integer types: megatron and gpt-neox disagree on 6 and 7, and no id is a float.
DTYPE_OF_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODE_OF_DTYPE = {name: code for code, name in DTYPE_OF_CODE.items()}

_SCAN_BYTES = 1 << 26


@dataclass(frozen=True)
class IndexedSummary:
    """What a whole pair of files holds."""

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int


@dataclass(frozen=True)
class IndexHeader:
    """What the first bytes of PREFIX.idx say."""

    dtype: str
    sequences: int
    bounds: int
    """Entries of the table of documents: one more than documents."""

    @property
    def width(self) -> int:
        """Return the bytes of one id."""
        return int(np.dtype(self.dtype).itemsize)

    @property
    def pointers_at(self) -> int:
        """Return where the table of byte offsets begins in PREFIX.idx."""
        return HEADER.size + LENGTH_BYTES * self.sequences

    @property
    def bounds_at(self) -> int:
        """Return where the table of documents begins in PREFIX.idx."""
        return self.pointers_at + POINTER_BYTES * self.sequences

    @property
    def index_size(self) -> int:
        """Return the bytes of the whole PREFIX.idx."""
        return self.bounds_at + BOUND_BYTES * self.bounds


def dtype_for_vocabulary(vocab_size: int) -> str:
    """Return the id type by Megatron's rule: uint16 below 65,500 ids, int32 from there on."""
    return "uint16" if vocab_size < 65500 else "int32"


def read_header(prefix: str) -> IndexHeader:
    """Return the header of PREFIX.idx, whose size is what the header asks for.

    Raises:
        ConfigError: a file of the pair is missing, or PREFIX.idx is no index or cut off.
    """
    index_path, _ = _require_files(prefix)
    with open_regular(index_path) as stream:
        header = _read_header(stream, index_path)
    _check_index_size(header, index_path, index_path.stat().st_size)
    return header


def check_indexed(prefix: str) -> IndexedSummary:
    """Check that the two files of `prefix` are whole and belong together; reads a few bytes of each.

    Raises:
        ConfigError: a file is missing, not an index, cut off, empty, or of another pair.
    """
    header = read_header(prefix)
    index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    data_size = data_path.stat().st_size
    with open_regular(index_path) as stream:
        if header.sequences == 0 or header.bounds < 2 or data_size == 0:
            raise ConfigError(f"{prefix} holds no tokens: the data set is empty")
        length, pointer, first_bound, last_bound = _read_ends(stream, header)
    if first_bound != 0 or last_bound != header.sequences:
        raise ConfigError(
            f"{index_path} is damaged: its documents do not cover its {header.sequences} sequences"
        )
    expected = pointer + length * header.width
    if length < 0 or pointer < 0 or expected != data_size or data_size % header.width:
        cause = "cut off" if expected > data_size else "of another run"
        raise ConfigError(
            f"{data_path} has {data_size} bytes but {index_path.name} describes {expected} ({header.dtype} ids): "
            f"one of them is {cause}; preprocess the data again"
        )
    return IndexedSummary(
        prefix=prefix,
        dtype=header.dtype,
        documents=header.bounds - 1,
        sequences=header.sequences,
        tokens=data_size // header.width,
    )


def max_token_id(prefix: str) -> int:
    """Return the largest id in PREFIX.bin, read in blocks of 64 MiB: for data without a manifest.

    Raises:
        ConfigError: as check_indexed, or the data holds a negative id.
    """
    summary = check_indexed(prefix)
    dtype = np.dtype(summary.dtype)
    largest = 0
    with open_regular(f"{prefix}.bin") as stream:
        while block := stream.read(_SCAN_BYTES):
            ids = np.frombuffer(block, dtype=dtype)
            if int(ids.min()) < 0:
                raise ConfigError(f"{prefix}.bin holds the negative token id {int(ids.min())}")
            largest = max(largest, int(ids.max()))
    return largest


def count_tokens(prefix: str, begin: float, end: float) -> int:
    """Return the tokens in the sequences from share `begin` to share `end` of a data set (0.0 to 1.0: all).

    Bounds are rounded to whole sequences as megatron-core rounds them.

    Raises:
        ConfigError: as check_indexed.
    """
    summary = check_indexed(prefix)
    first, last = round(begin * summary.sequences), round(end * summary.sequences)
    lengths = np.memmap(f"{prefix}.idx", np.dtype("<i4"), "r", offset=HEADER.size, shape=(summary.sequences,))
    return int(lengths[first:last].sum(dtype=np.int64))


def read_document(prefix: str, document: int) -> Any:
    """Return the ids [n] of one document, all its sequences joined.

    Raises:
        ConfigError: as check_indexed, or there is no such document.
    """
    summary, header = check_indexed(prefix), read_header(prefix)
    if not 0 <= document < summary.documents:
        raise ConfigError(f"{prefix} has documents 0 to {summary.documents - 1}, not {document}")
    size = summary.tokens * header.width
    with open_regular(f"{prefix}.idx") as index, open_regular(f"{prefix}.bin") as data:
        first, last = _unpack(index, header.bounds_at + BOUND_BYTES * document, "<qq")
        if not 0 <= first <= last <= summary.sequences:
            raise ConfigError(
                f"{prefix}.idx is damaged: document {document} goes from sequence {first} to {last} of "
                f"{summary.sequences}"
            )
        if first == last:
            return np.empty(0, dtype=summary.dtype)
        (begin,) = _unpack(index, header.pointers_at + POINTER_BYTES * first, "<q")
        end = size
        if last < summary.sequences:
            (end,) = _unpack(index, header.pointers_at + POINTER_BYTES * last, "<q")
        if not 0 <= begin <= end <= size or (end - begin) % header.width:
            raise ConfigError(f"{prefix}.idx is damaged: document {document} spans bytes {begin} to {end}")
        data.seek(begin)
        return np.frombuffer(data.read(end - begin), dtype=summary.dtype)


def _require_files(prefix: str) -> tuple[Path, Path]:
    index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [path.name for path in (index_path, data_path) if not os.path.isfile(path)]
    if not missing:
        return index_path, data_path
    if prefix.endswith((".bin", ".idx")) and os.path.isfile(prefix):
        raise ConfigError(f"{prefix} is one file of a pair: give its path without {prefix[-4:]}")
    raise ConfigError(f"data set {prefix} has no {' and no '.join(missing)}: both files are needed")


def _read_header(stream: BinaryIO, path: Path) -> IndexHeader:
    content = stream.read(HEADER.size)
    if content.startswith(OLD_MAGIC):
        raise ConfigError(
            f"{path} is of the old TNTIDX format (GPT-NeoX calls it lazy or cached), which is not supported: preprocess "
            "the text again, or convert the files to the mmap format"
        )
    if content[: len(MAGIC)] != MAGIC:
        raise ConfigError(f"{path} is not a Megatron index: wrong first bytes {content[: len(MAGIC)]!r}")
    if len(content) < HEADER.size:
        raise ConfigError(f"{path} is cut off inside its header: {len(content)} of {HEADER.size} bytes")
    _, version, code, sequences, bounds = HEADER.unpack(content)
    if version != VERSION:
        raise ConfigError(f"{path} has index version {version}, only {VERSION} is known")
    if code not in DTYPE_OF_CODE:
        raise ConfigError(f"{path} has id type code {code}, allowed are {sorted(DTYPE_OF_CODE)}")
    return IndexHeader(dtype=DTYPE_OF_CODE[code], sequences=sequences, bounds=bounds)


def _check_index_size(header: IndexHeader, path: Path, size: int) -> None:
    """Compare sizes before anything is read by count: a damaged header may claim 2^64 sequences."""
    if size == header.index_size:
        return
    if header.sequences and size == header.index_size + header.sequences:
        raise ConfigError(f"{path} is a multimodal index (one mode per sequence), which is not supported")
    cause = "cut off" if size < header.index_size else "damaged"
    raise ConfigError(f"{path} is {cause}: {size} bytes, its header asks for {header.index_size}")


def _read_ends(stream: BinaryIO, header: IndexHeader) -> tuple[int, int, int, int]:
    """Return the last sequence's length and pointer, and the first and last document bound."""
    (length,) = _unpack(stream, header.pointers_at - LENGTH_BYTES, "<i")
    (pointer,) = _unpack(stream, header.bounds_at - POINTER_BYTES, "<q")
    (first_bound,) = _unpack(stream, header.bounds_at, "<q")
    (last_bound,) = _unpack(stream, header.index_size - BOUND_BYTES, "<q")
    return length, pointer, first_bound, last_bound


def _unpack(stream: BinaryIO, offset: int, layout: str) -> tuple[int, ...]:
    stream.seek(offset)
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))
