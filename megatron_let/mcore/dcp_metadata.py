"""Read a checkpoint's `.metadata`, which torch reads with plain pickle, without running anything in it.

What it describes is built anew from checked plain values, so nothing of the file but these reaches torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_let.mcore.safe_pickle import (
    GETATTR,
    Enumeration,
    Member,
    Record,
    Refused,
    read_pickle,
    record_type,
    refusals,
    shown,
)
from megatron_let.mcore.torch_file import DTYPES
from megatron_let.regular_files import MIB, read_bytes

METADATA_FILE = ".metadata"
_LARGEST = 4096 * MIB
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 1 << 62

_SIZE, _INDEX, _TENSOR, _BYTES, _CHUNK, _PROPERTIES, _METADATA, _STORAGE_INFO = (
    record_type(name) for name in ("Size", "Index", "Tensor", "Bytes", "Chunk", "Properties", "Metadata", "Storage")
)  # fmt: skip
_OTHER = record_type("Other")
_DCP = "torch.distributed.checkpoint"
_NAMES: Mapping[tuple[str, str], Any] = {
    **DTYPES,
    ("torch", "Size"): _SIZE,
    (f"{_DCP}.metadata", "Metadata"): _METADATA,
    (f"{_DCP}.metadata", "MetadataIndex"): _INDEX,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _TENSOR,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _BYTES,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _CHUNK,
    (f"{_DCP}.metadata", "TensorProperties"): _PROPERTIES,
    (f"{_DCP}.filesystem", "_StorageInfo"): _STORAGE_INFO,
    # Written along and not read by a load: how the save was planned, where to, and deprecated fields of tensors.
    ("torch.serialization", "_get_layout"): _OTHER,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): Enumeration,
    (f"{_DCP}.metadata", "StorageMeta"): _OTHER,
    (f"{_DCP}.planner", "SavePlan"): _OTHER,
    (f"{_DCP}.planner", "WriteItem"): _OTHER,
    (f"{_DCP}.planner", "WriteItemType"): Enumeration,
    GETATTR: Member,
    (f"{_DCP}.planner", "TensorWriteData"): _OTHER,
    (f"{_DCP}.planner", "BytesIOWriteData"): _OTHER,
    ("pathlib", "PosixPath"): _OTHER,
    ("pathlib._local", "PosixPath"): _OTHER,
}


def read_metadata(directory: Path) -> Metadata:
    """Return what `.metadata` says of a checkpoint: each entry's shape and type, and where its bytes lie.

    Raises:
        ConfigError: it asks for a name that is not on the list, is damaged, or does not fit the files beside it.
    """
    path = directory / METADATA_FILE
    with refusals(path):
        metadata = _build(read_pickle(read_bytes(path, limit=_LARGEST), _NAMES))
        _check_places(metadata.storage_data, directory)
        _check_room(metadata)
    return metadata


def _build(record: Any) -> Metadata:
    fields = _fields(record, _METADATA)
    entries = {_text(name): _entry(entry) for name, entry in _dict(fields["state_dict_metadata"]).items()}
    places = [(_index(index), _place(info)) for index, info in _dict(fields["storage_data"]).items()]
    storage = dict(places)
    if len(storage) != len(places):
        raise Refused("gives two places for one entry")
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta())


def _fields(record: Any, kind: type[Record]) -> dict[str, Any]:
    if type(record) is not kind or record.args:
        raise Refused(f"holds something else where a description of kind {kind.__name__} belongs")
    return _dict(record.state if record.state is not None else {})


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise Refused("holds something else where a table belongs")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise Refused("holds something else where a name belongs")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_ELEMENTS:
        raise Refused("holds something else, or a negative or huge number, where a size belongs")
    return value


def _size(record: Any) -> torch.Size:
    if type(record) is not _SIZE or len(record.args) != 1 or not isinstance(record.args[0], (tuple, list)):
        raise Refused("holds something else where a shape belongs")
    if len(record.args[0]) > _MAX_DIMENSIONS:
        raise Refused(f"holds a shape of more than {_MAX_DIMENSIONS} dimensions")
    return torch.Size([_count(value) for value in record.args[0]])


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(record) is _BYTES:
        return BytesStorageMetadata()
    fields = _fields(record, _TENSOR)
    properties = fields["properties"]
    if type(properties) is not _PROPERTIES or type(properties.state) is not tuple:
        raise Refused("holds something else where a tensor's properties belong")
    dtype = properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise Refused("holds something else where a tensor's type belongs")
    if type(fields["chunks"]) is not list:
        raise Refused("holds something else where a tensor's pieces belong")
    size = _size(fields["size"])
    chunks = [_chunk(chunk, size) for chunk in fields["chunks"]]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _chunk(record: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(record, _CHUNK)
    offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
    if not len(offsets) == len(sizes) == len(size):
        raise Refused("holds a piece with another number of dimensions than its tensor")
    if any(offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)):
        raise Refused("holds a piece that reaches beyond its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, _INDEX)
    offset = fields.get("offset")
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _size(offset))


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, _STORAGE_INFO)
    if fields.get("transform_descriptors"):
        raise Refused("asks for its bytes to be transformed")
    name = _text(fields["relative_path"])
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.distcp", name):
        raise Refused("places an entry in a file that is no .distcp file of its own directory")
    return _StorageInfo(name, _count(fields["offset"]), _count(fields["length"]))


def _check_places(places: Mapping[MetadataIndex, _StorageInfo], directory: Path) -> None:
    """Refuse entries outside their files, and entries that share bytes: together they are no larger than the files."""
    ends: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for info in sorted(places.values(), key=lambda info: (info.relative_path, info.offset)):
        name = info.relative_path
        if name not in sizes:
            path = directory / name
            if not path.is_file():
                raise Refused(f"places an entry in {name}, which is no file there")
            sizes[name] = path.stat().st_size
        if info.offset < ends.get(name, 0) and info.length:
            raise Refused(f"places two entries on the same bytes of {name}")
        ends[name] = info.offset + info.length
        if ends[name] > sizes[name]:
            raise Refused(f"places an entry behind the end of {name}")


def _check_room(metadata: Metadata) -> None:
    """Refuse tensors that are larger than the bytes stored for them."""
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            if MetadataIndex(name) not in metadata.storage_data:
                raise Refused(f"gives no place for {shown(name)}")
            continue
        stored = 0
        for chunk in entry.chunks:
            place = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            elements = math.prod(chunk.sizes)
            if place is None or elements * entry.properties.dtype.itemsize > place.length:
                raise Refused(f"gives no place with enough bytes for a piece of {shown(name)}")
            stored += elements
        if math.prod(entry.size) > stored:
            raise Refused(f"stores {stored} numbers of {shown(name)}, which has more")
