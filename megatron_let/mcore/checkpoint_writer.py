"""A checkpoint's content in two halves: planned and copied by all ranks together, then written by each alone.

megatron-core's own writers start processes on every save, wait for ever when one of them is killed, take the files of
rank 0 to be written whatever the disk says, and on a CPU hand the live tensors to the background. Here megatron-core
plans what goes where, and the writing is a plain function that a thread may run while training goes on.
"""

from __future__ import annotations

import hashlib
import io
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO, cast
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.storage import WriteResult

from megatron_let.data.digests import sha256_of_stream
from megatron_let.mcore.checkpoint import (
    ITERATION,
    RUN,
    SCHEDULER,
    Parts,
    content_metadata,
    plain_metadata,
    sharded_parts,
)
from megatron_let.mcore.optimizer import schedule_state
from megatron_let.mcore.parallel import ParallelContext

_FORMAT = ("torch_dist", 1)


@dataclass(frozen=True)
class Written:
    """What one rank has written."""

    results: list[WriteResult]
    """Where each of its tensors and objects lies."""
    files: dict[str, dict[str, object]]
    """Size and SHA-256 of each file, taken on the way to the disk and found again when it was read back."""
    host: str
    """The machine it was written on."""


class _Planner(TorchDistSaveShardedStrategy):
    """Stops where megatron-core would start to write, and keeps what was planned."""

    writer: Any
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


class ContentPlanner:
    """Plans the checkpoints of one run, whose structure stays the same: ranks settle who writes what only once."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._planner = _Planner(*_FORMAT)
        self._strategy = FullyParallelSaveStrategyWrapper(
            self._planner, context.groups.dp_cp, do_cache_distribution=True
        )
        self._is_checked = False

    def plan(self, directory: Path, parts: Parts, *, iteration: int, run: dict[str, Any]) -> Content:
        """Return this rank's share of `parts` and the plain values `run`; every rank calls this.

        Nothing is written into `directory`, which exists and is empty. The share still refers to the live tensors.
        """
        metadata = content_metadata(self._context)
        state = sharded_parts(parts, self._context, metadata, is_loading=False)
        state[ITERATION] = iteration
        state[RUN] = run
        if parts.scheduler is not None:
            state[SCHEDULER] = schedule_state(parts.scheduler)
        common = io.BytesIO()

        def keep(_: TorchCommonSaveStrategy, values: dict[str, Any], __: str) -> None:
            if self._context.rank == 0:
                torch.save(values, common)

        with (
            patch.object(
                filesystem_async, "_get_write_results_queue", Queue
            ),  # else a manager program is started
            patch.object(TorchCommonSaveStrategy, "save_common", keep),
        ):
            dist_checkpointing.save(
                state,
                str(directory),
                self._strategy,
                validate_access_integrity=not self._is_checked,
                async_sharded_save=True,
                content_metadata=plain_metadata(metadata),
            )
        self._is_checked = True
        return Content(directory, self._planner.writer, self._planner.metadata, common.getvalue())


class Content:
    """One rank's share of a checkpoint. Nothing here communicates, so that threads may use it."""

    def __init__(self, directory: Path, writer: Any, metadata: Any, common: bytes) -> None:
        self._directory = directory
        self._writer = writer
        self._metadata = metadata
        """Of the whole checkpoint; rank 0 alone has it."""
        self._common = common

    @property
    def num_bytes(self) -> int:
        """Return about how many bytes this rank will write."""
        buckets = self._writer.write_buckets
        tensors = sum(tensor.nbytes for _, _, (_, items) in buckets for _, tensor in items)
        return tensors + sum(data.getbuffer().nbytes for _, _, (items, _) in buckets for _, data in items)

    def copy(self) -> None:
        """Take copies of all tensors into CPU memory: from here on training may change them."""
        self._writer.write_buckets = [
            (path, key, (objects, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]))
            for path, key, (objects, tensors) in self._writer.write_buckets
        ]

    def write(self) -> Written:
        """Write this rank's files and read them back. Raises OSError."""
        results: list[WriteResult] = []
        files: dict[str, dict[str, object]] = {}
        for path, key, items in self._writer.write_buckets:
            with Path(path).open("wb") as file:
                stream = _Hashing(file)
                try:
                    results += [
                        self._write_item(stream, item, data, key) for part in items for item, data in part
                    ]
                except Exception:
                    if stream.error is not None:
                        raise stream.error from None
                    raise
            files[key] = stream.entry()
            verify(Path(path), files[key])
        self._writer.write_buckets = []  # the copies may be as large as the model
        return Written(results, files, socket.gethostname())

    def finish(self, results: Sequence[list[WriteResult]]) -> None:
        """Write what belongs to the whole checkpoint, from the results of all ranks; rank 0. Raises OSError."""
        (self._directory / COMMON_STATE_FNAME).write_bytes(self._common)
        self._writer.finish(self._metadata, list(results))
        save_config(CheckpointingConfig(*_FORMAT), str(self._directory))

    def _write_item(self, stream: _Hashing, item: Any, data: Any, key: str) -> WriteResult:
        return _write_item(
            self._writer.transforms, cast(Any, stream), data, item, key, SerializationFormat.TORCH_SAVE
        )


class _Hashing:
    """A file being written, and the checksum of what went in."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        self.error: OSError | None = None
        """Why a write failed: torch, which calls it, then tells of a file position that it did not expect."""

    def write(self, data: Any) -> int:
        self._digest.update(data)
        try:
            count = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._size += count
        return count

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> dict[str, object]:
        """Return size and checksum for the manifest."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def verify(path: Path, entry: dict[str, object]) -> None:
    """Put a file on the disk and read it back from there.

    Raises:
        OSError: what comes back is not what was written.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # ask the disk, not the memory that holds what was written
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = {"sha256": sha256_of_stream(file), "bytes": file.tell()}
    if found != entry:
        raise OSError(f"{path.name} does not read back as it was written")
