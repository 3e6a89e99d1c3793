"""Sources to blocks: nothing lost, nothing numbered wrongly, and going on from any block gives the same rest."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.blocks import START, Block, Position, RecordKind
from megatron_let.data.input_rules import FoundSource, InputRules
from megatron_let.data.readers import read_blocks
from megatron_let.errors import ConfigError
from tests.data.standard_input import piped_standard_input

Record = tuple[int, int, bytes | None]

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "zstd frames": lambda content: b"".join(
        zstandard.compress(content[begin : begin + 37]) for begin in range(0, len(content), 37)
    ),
}
CONTENT = b"".join(b'{"text": "%06d %s"}\n' % (n, os.urandom(30).hex().encode()) for n in range(3000))


def source_of(path: Path, kind: RecordKind = RecordKind.JSON_LINES) -> FoundSource:
    return FoundSource(str(path), path.stat().st_size, path.stat().st_mtime_ns, kind, is_parquet=False)


def write(path: Path, content: bytes) -> FoundSource:
    path.write_bytes(content)
    return source_of(path)


def records_of(blocks: Sequence[Block]) -> list[Record]:
    """Return each record's number, place and content, None where it was too long; blocks are checked on the way."""
    found: list[Record] = []
    for block, following in zip_longest(blocks, blocks[1:]):
        lines = block.content.splitlines(keepends=True)
        place = block.first_byte
        for number, line in enumerate(lines, start=block.first_record):
            found.append((number, place, line))
            place += len(line)
        if block.too_long:
            assert not lines
            found.append((block.first_record, place, None))
        assert block.is_last == (following is None)
        assert block.end.records == block.first_record - 1 + len(lines) + block.too_long
        assert block.too_long or block.end.content_bytes == place
        if following:
            assert (following.first_record, following.first_byte) == (
                block.end.records + 1,
                block.end.content_bytes,
            )
    return found


@given(
    lines=st.lists(st.integers(0, 60).map(lambda size: b"x" * size), max_size=40),
    ends_with_newline=st.booleans(),
    compression=st.sampled_from(sorted(COMPRESSIONS)),
    block_bytes=st.integers(1, 150),
    limit=st.integers(1, 80),
    read_bytes=st.integers(1, 80),
)
@settings(max_examples=150, deadline=None)
def test_blocks_hold_all_records_and_any_of_their_ends_is_a_place_to_go_on_from(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    ends_with_newline: bool,
    compression: str,
    block_bytes: int,
    limit: int,
    read_bytes: int,
) -> None:
    content = b"\n".join([b"{}", *lines]) + b"\n" * ends_with_newline
    disk = COMPRESSIONS[compression](content)
    source = write(tmp_path_factory.getbasetemp() / "property", disk)
    rules = InputRules(block_bytes=block_bytes, max_document_bytes=limit)
    blocks = list(read_blocks(source, rules, read_bytes=read_bytes))
    whole, place = records_of(blocks), 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        kept = line if len(line.rstrip(b"\n")) <= limit else None
        assert whole[number - 1] == (number, place, kept)
        place += len(line)
    assert len(whole) == number
    for block in blocks:
        assert block.end.digest == hashlib.sha256(disk[: block.end.disk_bytes]).hexdigest()
    assert blocks[-1].end.disk_bytes == len(disk)
    for index, block in enumerate(blocks):
        rest = list(read_blocks(source, rules, block.end, read_bytes=read_bytes))
        assert records_of(rest) == records_of(blocks[index + 1 :])
        assert rest[-1].end == blocks[-1].end


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_going_on_with_other_block_and_read_sizes_is_right_too(tmp_path: Path, compression: str) -> None:
    source = write(tmp_path / "input", COMPRESSIONS[compression](CONTENT))
    blocks = list(read_blocks(source, InputRules(block_bytes=5000), read_bytes=70_000))
    middle = blocks[len(blocks) // 2].end
    for block_bytes in (100, 1 << 20):
        rest = list(read_blocks(source, InputRules(block_bytes=block_bytes), middle, read_bytes=999))
        assert b"".join(block.content for block in rest) == CONTENT[middle.content_bytes :]
        assert rest[0].first_record == middle.records + 1
        assert rest[-1].end == blocks[-1].end


def test_positions_do_not_depend_on_where_a_run_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path / "input", COMPRESSIONS["zstd frames"](CONTENT))
    rules = InputRules(block_bytes=5000)
    blocks = list(read_blocks(source, rules, read_bytes=1000))
    assert len({block.end.disk_bytes for block in blocks}) > 10
    rest = list(read_blocks(source, rules, blocks[3].end, read_bytes=1000))
    ends = {block.end.content_bytes: block.end for block in blocks}
    common = [block.end for block in rest if block.end.content_bytes in ends]
    assert len(common) > 10
    assert [ends[end.content_bytes] for end in common] == common


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_going_on_in_a_changed_file_is_an_error_before_any_block(tmp_path: Path, compression: str) -> None:
    path, compress = tmp_path / "input", COMPRESSIONS[compression]
    rules = InputRules(block_bytes=5000)
    disk = compress(CONTENT)
    blocks = list(read_blocks(write(path, disk), rules, read_bytes=1000))
    middle, last = blocks[len(blocks) // 2].end, blocks[-1].end
    others = {
        "one letter": compress(CONTENT.replace(b"000000", b"00000x", 1)),
        "another format": gzip.compress(CONTENT, 1) if compression == "zstd" else zstandard.compress(CONTENT),
        "shorter": disk[: middle.disk_bytes - 1],
        "shorter and whole": compress(CONTENT[:5000]),
        "damaged": disk[:300] + b"\xff\xff\xff\xff" + disk[304:],
        "refused": b"PK\x03\x04" + disk[4:],
        "empty": b"",
    }
    for other in others.values():
        for start in (middle, last):
            with pytest.raises(ConfigError, match=r"input has changed since the run .+ --restart"):
                next(read_blocks(write(path, other), rules, start, read_bytes=1000))
    if compression == "plain":
        # What comes after the place is not compared with anything: it was not read before.
        grown = list(read_blocks(write(path, disk + b"{}\n"), rules, last, read_bytes=1000))
        assert b"".join(block.content for block in grown) == b"{}\n"


def test_a_position_that_the_content_does_not_have_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "input", CONTENT)
    (*_, block) = read_blocks(source, InputRules())
    beyond = replace(block.end, content_bytes=len(CONTENT) + 1)
    with pytest.raises(ConfigError, match="input has changed since"):
        list(read_blocks(source, InputRules(), beyond))


@pytest.mark.parametrize("change", [b"{}\n", -10])
def test_a_file_that_changes_its_size_while_it_is_read_is_an_error(
    tmp_path: Path, change: bytes | int
) -> None:
    source = write(tmp_path / "input", CONTENT)
    blocks = read_blocks(source, InputRules(block_bytes=1000), read_bytes=1000)
    next(blocks)
    if isinstance(change, bytes):
        with (tmp_path / "input").open("ab") as stream:
            stream.write(change)
    else:
        os.truncate(tmp_path / "input", len(CONTENT) + change)
    with pytest.raises(
        ConfigError, match=rf"changed while it was read: {len(CONTENT)} bytes at the start.*--restart"
    ):
        list(blocks)


def test_a_growing_file_is_refused_as_soon_as_it_is_read_beyond_its_size(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", CONTENT)
    with open(source.path, "ab") as stream:
        stream.write(CONTENT * 3)
    blocks, taken = read_blocks(source, InputRules(block_bytes=1000), read_bytes=4096), list[Block]()
    with pytest.raises(ConfigError, match=rf"read: {len(CONTENT)} bytes at the start, at least \d+ now"):
        taken.extend(blocks)
    assert sum(len(block.content) for block in taken) <= len(CONTENT)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_file_of_another_format_is_an_error_when_read_too(tmp_path: Path, compression: str) -> None:
    source = write(tmp_path / "input", COMPRESSIONS[compression]("{}\n".encode("utf-16")))
    for read_bytes in (1, 100):
        with pytest.raises(ConfigError, match="is text in UTF-16"):
            list(read_blocks(source, InputRules(), read_bytes=read_bytes))


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "input", CONTENT)
    (tmp_path / "input").unlink()
    with pytest.raises(ConfigError, match=r"cannot read input .+: No such file"):
        list(read_blocks(source, InputRules()))
    (tmp_path / "input").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read input .+: Is a directory"):
        list(read_blocks(source, InputRules()))


def test_an_error_of_the_disk_is_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    source = write(tmp_path / "input", CONTENT)
    monkeypatch.setattr("megatron_let.data.raw_stream.Path.open", lambda path, mode: Broken())
    with pytest.raises(ConfigError, match=r"cannot read input .+/input: Input/output error"):
        list(read_blocks(source, InputRules()))


@pytest.mark.parametrize(("limit", "kept"), [(len(CONTENT), True), (len(CONTENT) - 1, False)])
def test_a_text_file_is_one_block(tmp_path: Path, limit: int, kept: bool) -> None:
    write(tmp_path / "input", gzip.compress(CONTENT))
    source = source_of(tmp_path / "input", RecordKind.TEXT_FILE)
    rules = InputRules(max_document_bytes=limit)
    (block,) = read_blocks(source, rules)
    assert block.content == (CONTENT if kept else b"")
    assert (block.kind, block.too_long, block.is_last) == (RecordKind.TEXT_FILE, not kept, True)
    assert (block.end.records, block.end.content_bytes, block.end.disk_bytes) == (
        1,
        len(CONTENT),
        source.size,
    )
    (nothing,) = read_blocks(source, rules, block.end)
    assert (nothing.content, nothing.too_long, nothing.is_last, nothing.end) == (b"", False, True, block.end)


def test_text_lines_are_cut_like_json_lines(tmp_path: Path) -> None:
    write(tmp_path / "input", b"one\ntwo\n")
    source = source_of(tmp_path / "input", RecordKind.TEXT_LINES)
    (block,) = read_blocks(source, InputRules())
    assert (block.kind, block.content, block.end.records) == (RecordKind.TEXT_LINES, b"one\ntwo\n", 2)


def read_standard_input(
    monkeypatch: pytest.MonkeyPatch, content: bytes, start: Position = START
) -> list[Block]:
    source = FoundSource("-", None, 0, RecordKind.JSON_LINES, is_parquet=False)
    with piped_standard_input(monkeypatch, content):
        return list(read_blocks(source, InputRules(block_bytes=10_000), start, read_bytes=25_000))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_standard_input_gives_the_blocks_that_a_file_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    disk = COMPRESSIONS[compression](CONTENT)
    of_file = list(
        read_blocks(write(tmp_path / "input", disk), InputRules(block_bytes=10_000), read_bytes=25_000)
    )
    of_pipe = read_standard_input(monkeypatch, disk)
    assert [replace(block, path="") for block in of_pipe] == [replace(block, path="") for block in of_file]
    assert {block.path for block in of_pipe} == {"-"}
    rest = read_standard_input(monkeypatch, disk, of_pipe[len(of_pipe) // 2].end)
    assert b"".join(block.content for block in rest) == CONTENT[rest[0].first_byte :]
    assert len(rest) < len(of_pipe)


def test_standard_input_that_does_not_wait_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, b"{}\n")
    source = FoundSource("-", None, 0, RecordKind.JSON_LINES, is_parquet=False)
    with open(reading, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(ConfigError, match=r"^input standard input does not wait for its writer"):
            list(read_blocks(source, InputRules()))
    os.close(writing)


def test_another_stream_than_before_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    end = read_standard_input(monkeypatch, CONTENT)[4].end
    for other in (CONTENT.replace(b"000001", b"x00001", 1), CONTENT[:1000], b""):
        with pytest.raises(ConfigError, match=r"^input standard input has changed since"):
            read_standard_input(monkeypatch, other, end)
