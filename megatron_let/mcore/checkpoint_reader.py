"""Have megatron-core and torch load a checkpoint through readers that run nothing of what lies in it.

By themselves torch reads `.metadata` with plain pickle and objects with `weights_only=False`; megatron-core reads
`common.pt` with whatever torch's default is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

from megatron.core.dist_checkpointing.strategies import torch as mcore_strategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_let.errors import ConfigError, LetError
from megatron_let.mcore.dcp_metadata import read_metadata
from megatron_let.mcore.safe_pickle import refusals
from megatron_let.mcore.torch_file import check_torch_file, load_torch_file
from megatron_let.regular_files import open_regular


class FilePart(io.RawIOBase):
    """The bytes `offset` to `offset + length` of an open file, as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move as in any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("negative position in a file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` as far as there are bytes; return their number."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(count)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint directory, given metadata that was read safely; it checks each part it opens."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:  # with no `rank`, torch looks for no other file
        """Return the metadata."""
        return self._metadata

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> IO[bytes]:
        part: Any = io.BufferedReader(FilePart(file, sinfo.offset, sinfo.length))
        with refusals(Path(self.path) / sinfo.relative_path, f"entry at byte {sinfo.offset}"):
            check_torch_file(part)
        checked: IO[bytes] = part
        return checked


class _Planner(mcore_strategy.MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Take an object, loaded with `weights_only`."""
        name = read_item.dest_index.fqn
        with refusals(Path(name)):
            loaded = load_torch_file(value)
        set_element(self.original_state_dict, self.mappings[name], loaded)


class _CommonStrategy(TorchCommonLoadStrategy):
    def __init__(self, common: dict[str, Any]) -> None:
        super().__init__()
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """Return the unsharded part that was loaded before."""
        return self._common


def load_strategy() -> Any:
    """Return megatron-core's way to load sharded tensors and objects in torch_dist format."""
    return mcore_strategy.TorchDistLoadShardedStrategy()


@contextmanager
def no_code_on_load(directory: Path, metadata: Metadata, common: dict[str, Any]) -> Iterator[Any]:
    """Have megatron-core load sharded content through our reader; yield the strategy for the unsharded part.

    metadata, common: what was read safely from this directory.
    """

    def reader(*_: Any, **__: Any) -> CheckpointReader:
        return CheckpointReader(directory, metadata)

    with (
        patch.object(mcore_strategy, "_get_filesystem_reader", reader),
        patch.object(mcore_strategy, "MCoreLoadPlanner", _Planner),
    ):
        yield _CommonStrategy(common)


def check_objects(directory: Path) -> None:
    """Look at a checkpoint's `.metadata` and at every object in its files, and build nothing.

    Its tensors, which are far more bytes, are checked when they are read.

    Raises:
        ConfigError: loading it would run code, or it is damaged.
    """
    metadata = read_metadata(directory)
    entries = metadata.state_dict_metadata.items()
    names = [name for name, entry in entries if isinstance(entry, BytesStorageMetadata)]
    for name in names:
        info = metadata.storage_data[MetadataIndex(name)]
        path = directory / info.relative_path
        with refusals(path, name), open_regular(path) as file:
            check_torch_file(io.BufferedReader(FilePart(file, info.offset, info.length)))


def first_failure(error: CheckpointException, problem: str) -> LetError:
    """Return the error of the first rank that failed to read, as one line behind `problem`."""
    cause = next((failure for failure, _ in error.failures.values()), None)
    if isinstance(cause, LetError):
        return ConfigError(str(cause))
    text = " ".join(str(cause).split())[:300] or type(cause).__name__
    return ConfigError(f"{problem}: {text}")
