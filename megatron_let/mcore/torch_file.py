"""Load what `torch.save` wrote, with `weights_only`, after a look at what it asks for and how much it claims to hold.

`weights_only` alone keeps code from running; it trusts the sizes in a file, and names that any library may have added.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch

from megatron_let.mcore.safe_pickle import Record, Refused, read_pickle, record_type

_BYTES_EACH = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
DTYPES: Mapping[tuple[str, str], torch.dtype] = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


class _Encoded(Record):
    """Bytes, as protocol 2 writes them: text and `latin1`."""

    __slots__ = ()

    def check_args(self) -> None:
        if len(self.args) != 2 or not isinstance(self.args[0], str) or self.args[1] != "latin1":
            raise Refused("encodes text in a way of its own")


class _Dtype(Record):
    """numpy's type of 32-bit words, the only one that a checkpoint holds."""

    __slots__ = ()

    def check_args(self) -> None:
        if self.args != ("u4", False, True):
            raise Refused("holds an array of another of numpy's types")

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if state != (3, "<", None, None, None, -1, -1, 0):
            raise Refused("changes numpy's type of 32-bit words")


class _Array(Record):
    """The state of numpy's random generator: a vector of 32-bit words."""

    __slots__ = ()

    def check_args(self) -> None:
        kind, shape, code = self.args
        if kind is not _ARRAY_TYPE or shape != (0,) or not isinstance(code, _Encoded) or code.args[0] != "b":
            raise Refused("builds a numpy array in a way of its own")

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        version, shape, dtype, is_fortran, data = state
        if version != 1 or is_fortran is not False or not isinstance(dtype, _Dtype) or dtype.state is None:
            raise Refused("fills a numpy array in a way of its own")
        if not isinstance(data, _Encoded) or shape != (len(data.args[0]) // 4,):
            raise Refused("holds a numpy array with more or fewer numbers than it says")


_ARRAY_TYPE = record_type("ndarray")
_STORAGES: Mapping[str, type[Record]] = {name: record_type(name) for name in _BYTES_EACH}
_NAMES: Mapping[tuple[str, str], Any] = {
    **DTYPES,
    **{("torch", name): kind for name, kind in _STORAGES.items()},
    ("torch", "Size"): record_type("Size"),
    ("torch._utils", "_rebuild_tensor_v2"): record_type("Tensor"),
    ("collections", "OrderedDict"): record_type("OrderedDict"),
    ("_codecs", "encode"): _Encoded,
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("numpy", "dtype"): _Dtype,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
}


def load_torch_file(stream: IO[bytes]) -> Any:
    """Return the content of a file or a part of one: plain values, tensors on the CPU, numpy's random state.

    Raises:
        Refused: it asks for something that could run code, or claims sizes that it does not have.
        Exception: it is damaged.
    """
    check_torch_file(stream)
    with _names_for_weights_only():
        return torch.load(stream, map_location="cpu", weights_only=True)


def check_torch_file(stream: IO[bytes]) -> None:
    """Look through a file without building anything from it, and put the stream back at its beginning.

    Raises:
        Refused, Exception: see `load_torch_file`.
    """
    size = stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise Refused("holds two records of one name")
        if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
            raise Refused("holds compressed records")
        if sum(info.file_size for info in records.values()) > size:
            raise Refused("holds records that claim more bytes than there are")
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"holds {len(pickles)} pickles instead of one")
        folder = pickles[0].removesuffix("data.pkl")

        def storage(pid: Any) -> Record:
            label, kind, key, _, count = pid
            name = next((name for name, known in _STORAGES.items() if kind is known), None)
            if label != "storage" or name is None or type(key) is not str or type(count) is not int:
                raise Refused("refers to a tensor's numbers in a way of its own")
            record = records.get(f"{folder}data/{key}")
            if record is None or record.file_size != count * _BYTES_EACH[name]:
                raise Refused(f"does not hold the {count} numbers that a tensor in it refers to")
            return Record(kind, count)

        read_pickle(archive.read(pickles[0]), _NAMES, storage)
    stream.seek(0)


@contextmanager
def _names_for_weights_only() -> Iterator[None]:
    """Have `weights_only` allow numpy's random state beside its own names, and nothing that libraries added."""
    words = np.zeros(1, np.uint32)
    reconstruct: Any = words.__reduce__()[0]
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([np.ndarray, np.dtype, type(words.dtype)])
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        torch.serialization.add_safe_globals([(reconstruct, f"{module}._reconstruct")])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(added)
