"""Input files: blocks of whole lines, compression by content, and no byte lost without an error."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.sources import LineBlock, find_sources, lines_of, read_blocks
from megatron_let.errors import ConfigError

CONTENT = b"".join(
    b'{"text": "%06d %s"}\n' % (number, os.urandom(30).hex().encode()) for number in range(3000)
)


def read(path: Path) -> bytes:
    return b"".join(block.content for block in read_blocks(str(path)))


@given(
    content=st.lists(st.binary(max_size=12), max_size=20).map(lambda lines: b"{" + b"\n".join(lines)),
    block_bytes=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_any_block_size_gives_the_same_numbered_lines(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "input"
    path.write_bytes(content)
    blocks = list(read_blocks(str(path), block_bytes))
    assert b"".join(block.content for block in blocks) == content
    assert all(block.content.endswith(b"\n") for block in blocks[:-1])
    lines = [line for block in blocks for line in lines_of(block)]
    expected = content.split(b"\n")
    is_cut = bool(expected.pop())
    assert [line.content for line in lines] == content.split(b"\n")[: len(expected) + is_cut]
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    assert [line.is_cut for line in lines] == [False] * len(expected) + [True] * is_cut


def test_blocks_stay_near_the_asked_size_unless_a_line_is_longer(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"short\n" * 1000 + b"x" * 5000 + b"\n" + b"short\n" * 1000)
    sizes = [len(block.content) for block in read_blocks(str(path), 1000)]
    assert sum(sizes) == path.stat().st_size
    assert [size for size in sizes if size > 2000] == [max(sizes)]
    assert 5000 < max(sizes) < 8000


def test_positions_end_at_the_size_on_disk(tmp_path: Path) -> None:
    for name, content in (("plain", CONTENT), ("gz", gzip.compress(CONTENT))):
        (tmp_path / name).write_bytes(content)
        positions = [block.position for block in read_blocks(str(tmp_path / name), 10_000)]
        assert positions == sorted(positions)
        assert positions[-1] == len(content)


@pytest.mark.parametrize("name", ["input.jsonl", "input.gz", "input.zst"])
def test_compression_is_known_by_content_and_not_by_name(tmp_path: Path, name: str) -> None:
    half = len(CONTENT) // 2
    frames = zstandard.compress(CONTENT[:half]) + zstandard.compress(CONTENT[half:])
    members = gzip.compress(CONTENT[:half]) + gzip.compress(CONTENT[half:])
    for content in (CONTENT, members, frames):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == CONTENT


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_compressed_file_cut_anywhere_is_an_error(tmp_path: Path, kind: str) -> None:
    whole = gzip.compress(CONTENT) if kind == "gzip" else zstandard.compress(CONTENT)
    path = tmp_path / "input"
    for tenth in range(1, 10):
        path.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(ConfigError, match="input is cut off or damaged near byte"):
            read(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="cut off or damaged"):
        read(path)


def test_flipped_bits_under_a_checksum_are_an_error(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    for whole in (gzip.compress(CONTENT), compressor.compress(CONTENT)):
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 0x10
        (tmp_path / "input").write_bytes(bytes(damaged))
        with pytest.raises(ConfigError, match="cut off or damaged"):
            read(tmp_path / "input")


def test_garbage_after_a_zstd_frame_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(zstandard.compress(CONTENT) + b"garbage")
    with pytest.raises(ConfigError, match="cut off or damaged"):
        read(tmp_path / "input")


def test_inputs_are_checked_before_any_work(tmp_path: Path) -> None:
    good, empty = tmp_path / "good", tmp_path / "empty"
    good.write_bytes(CONTENT)
    empty.touch()
    (tmp_path / "parquet").write_bytes(b"PAR1....")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04....")
    (tmp_path / "link").symlink_to(good)
    for paths, message in (
        ([], "names no file"),
        ([good, tmp_path / "absent"], "absent is not a file"),
        ([tmp_path], "is not a file"),
        ([good, empty], "empty is empty"),
        ([good, tmp_path / "parquet"], "is a parquet file"),
        ([tmp_path / "zip"], "is a zip file"),
        ([good, tmp_path / "link"], "is given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_sources([str(path) for path in paths])
    assert [(source.path, source.size) for source in find_sources([str(good)])] == [(str(good), len(CONTENT))]


def test_a_block_without_last_newline_marks_only_its_last_line_as_cut() -> None:
    block = LineBlock("input", first_line=5, content=b"a\n\nb", position=4)
    assert [(line.number, line.content, line.is_cut) for line in lines_of(block)] == [
        (5, b"a", False),
        (6, b"", False),
        (7, b"b", True),
    ]
