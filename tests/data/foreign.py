"""Writers of .bin/.idx pairs that are not ours: megatron-core's builder, and GPT-NeoX's layout written out by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

Documents = list[list[list[int]]]
"""Documents of sequences of ids."""

NEOX_CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float32": 6,
    "float64": 7,
    "uint16": 8,
}


def write_with_core(prefix: Path, documents: Documents, dtype: str, multimodal: bool = False) -> None:
    """Write a pair as Megatron-LM does; a document without sequences repeats its bound."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype), multimodal=multimodal)
    for sequences in documents:
        ids = [token_id for sequence in sequences for token_id in sequence]
        lengths = [len(sequence) for sequence in sequences]
        # A list, because core adds modes as `[0] * lengths` when none are given.
        builder.add_document(ids, lengths, [0] * len(lengths))
    builder.finalize(f"{prefix}.idx")


def write_as_neox(prefix: Path, documents: Documents, dtype: str) -> None:
    """Write a pair as GPT-NeoX's "mmap" writer lays it out (sequences item by item, then the end of the document)."""
    sizes: list[int] = []
    doc_idx = [0]
    data = b""
    for sequences in documents:
        for sequence in sequences:
            data += np.array(sequence, dtype=dtype).tobytes()
            sizes.append(len(sequence))
        doc_idx.append(len(sizes))
    pointers, address = [], 0
    for size in sizes:
        pointers.append(address)
        address += size * np.dtype(dtype).itemsize
    Path(f"{prefix}.bin").write_bytes(data)
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", NEOX_CODES[dtype])
        + struct.pack("<Q", len(sizes))
        + struct.pack("<Q", len(doc_idx))
        + np.array(sizes, dtype=np.int32).tobytes()
        + np.array(pointers, dtype=np.int64).tobytes()
        + np.array(doc_idx, dtype=np.int64).tobytes()
    )


def edit_index(prefix: Path, offset: int, layout: str, value: Any) -> None:
    """Write one value into PREFIX.idx."""
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, value)
    path.write_bytes(content)
