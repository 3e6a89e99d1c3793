"""A file's digest is that of its content, whatever the blocks, and every byte of it is told of."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron_let.data.digests import sha256_of, sha256_while_reading


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 9])
def test_the_digest_is_that_of_the_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    counts: list[int] = []
    assert sha256_of(path) == sha256_of(str(path), counts.append) == expected
    assert sum(counts) == len(content)
    for block_bytes in (1, 7, 1 << 20):
        blocks: list[bytes] = []
        assert sha256_while_reading(path, blocks.append, block_bytes) == expected
        assert b"".join(blocks) == content
        assert all(len(block) <= block_bytes for block in blocks)
