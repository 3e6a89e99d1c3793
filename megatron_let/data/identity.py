"""One short value for "the same division into sequences": what cached sample indices belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_let.data.manifest import read_manifest
from megatron_let.regular_files import open_regular

_BLOCK_BYTES = 1 << 16
_MAX_BLOCKS = 1024


def data_identity(prefix: str) -> str:
    """Return a digest that changes when a pair is written anew with other lengths, and with nothing else.

    Hashed: both sizes, PREFIX.idx, and its checksum in the manifest where there is one. Of an index over 64 MiB evenly
    spaced blocks are read: its byte offsets add up all lengths before them, so that a change almost anywhere shows.
    The ids themselves do not count, nor does the time: an index over the same lengths is the same index.

    Raises:
        OSError: a file cannot be read.
    """
    index_path = Path(f"{prefix}.idx")
    index_size = index_path.stat().st_size
    manifest = read_manifest(prefix)
    stated = "" if manifest is None else manifest.idx_sha256
    digest = hashlib.sha256(f"{Path(f'{prefix}.bin').stat().st_size} {index_size} {stated} ".encode())
    num_blocks = -(-index_size // _BLOCK_BYTES)
    num_read = min(num_blocks, _MAX_BLOCKS)
    with open_regular(index_path) as stream:
        for number in range(num_read):
            stream.seek(number * num_blocks // num_read * _BLOCK_BYTES)
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
