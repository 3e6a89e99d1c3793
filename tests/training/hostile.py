"""Checkpoints that would run code, or claim what is not so: made from honest ones by whoever can write their files."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_let.training import checkpoint_files as files


class Hostile:
    """An object whose pickle creates a directory when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def seal(directory: Path) -> None:
    """Make the manifest fit the files, as whoever can change the files can."""
    (directory / files.MANIFEST).unlink()
    manifest = {"format": 1, "files": files.describe_files(directory)}
    (directory / files.MANIFEST).write_text(json.dumps(manifest))


def edit_metadata(directory: Path, edit: Callable[[Metadata], object]) -> None:
    """Change what `.metadata` says."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def spoil_metadata(directory: Path, value: object) -> None:
    """Hide an object in `.metadata` where no load looks for one."""
    edit_metadata(directory, lambda metadata: setattr(metadata, "planner_data", value))


def spoil_common(directory: Path, value: object) -> None:
    """Hide an object in common.pt."""
    common = torch.load(directory / "common.pt", weights_only=True)
    torch.save({**common, "more": value}, directory / "common.pt")


def spoil_object(directory: Path, value: object, *, starts: str = "rng_state") -> None:
    """Put an object in the place of a stored one, at the end of its file, and have `.metadata` point there."""

    def edit(metadata: Any) -> None:
        index, info = next(
            (index, info)
            for index, info in metadata.storage_data.items()
            if index.fqn.startswith(starts)
            and isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata)
        )
        place_at_end(directory, info, [value])
        assert index in metadata.storage_data

    edit_metadata(directory, edit)


def spoil_tensor(directory: Path, value: object) -> None:
    """Put an object in the place of a piece of the embedding."""

    def edit(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "embedding.word_embeddings.weight":
                # A piece must have room for its numbers, so the rest is filled up.
                place_at_end(directory, info, [value, torch.zeros(100_000)])

    edit_metadata(directory, edit)


def place_at_end(directory: Path, info: Any, value: object) -> None:
    """Append what `torch.save` writes to the file of an entry and let the entry mean that."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path = directory / info.relative_path
    info.offset, info.length = path.stat().st_size, buffer.tell()
    with path.open("ab") as stream:
        stream.write(buffer.getvalue())
