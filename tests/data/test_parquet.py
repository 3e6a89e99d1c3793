"""Parquet files: each row a JSON line, whatever its types, and the same rest from any block on."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import os
import tracemalloc
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_let.data.blocks import Block, RecordKind
from megatron_let.data.input_rules import FoundSource, InputRules
from megatron_let.data.readers import read_blocks
from megatron_let.data.sources import find_sources
from megatron_let.errors import ConfigError

RULES = InputRules(block_bytes=1 << 18)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(columns: dict[str, Any], path: str = "a.parquet", **options: Any) -> FoundSource:
    """Write a parquet file and find it."""
    parquet.write_table(pyarrow.table(columns), path, **options)
    (source,) = find_sources([path], RULES)
    return source


def lines_of(source: FoundSource, *columns: str) -> list[bytes]:
    """Return the lines of the columns, newlines included."""
    blocks = list(read_blocks(source, InputRules(columns=columns or ("text",))))
    return b"".join(block.content for block in blocks).splitlines(keepends=True)


def values_of(column: Any) -> list[Any]:
    """Return what becomes of one column's values."""
    return [orjson.loads(line)["text"] for line in lines_of(put({"text": column}))]


def undecodable(*values: bytes) -> Any:
    """Return a text column whose bytes nobody has checked."""
    column = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(column), column.buffers())


def test_rows_become_json_lines_of_the_columns_asked_for() -> None:
    source = put({"text": ["a\nb", 'ü"', None], "meta": [{"s": "x"}, None, {"s": None}], "other": [1, 2, 3]})
    assert (source.kind, source.is_parquet) == (RecordKind.JSON_LINES, True)
    assert lines_of(source) == [b'{"text":"a\\nb"}\n', '{"text":"ü\\""}\n'.encode(), b'{"text":null}\n']
    assert [orjson.loads(line) for line in lines_of(source, "text", "meta", "absent", "text")] == [
        {"text": "a\nb", "meta": {"s": "x"}},
        {"text": 'ü"', "meta": None},
        {"text": None, "meta": {"s": None}},
    ]
    assert lines_of(source, "absent") == [b"{}\n"] * 3


def test_any_type_becomes_json() -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    columns = {
        "large": (pyarrow.array(["a"], pyarrow.large_string()), "a"),
        "dictionary": (pyarrow.array(["a"]).dictionary_encode(), "a"),
        "binary": (pyarrow.array(["ü".encode()], pyarrow.binary()), "ü"),
        "dictionary of binary": (pyarrow.array([b"a"]).dictionary_encode(), "a"),
        "list": (pyarrow.array([["a", "b"]]), ["a", "b"]),
        "list of binary": (pyarrow.array([[b"a", b"b"]]), ["a", "b"]),
        "map": (pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())), [["k", 1]]),
        "number": (pyarrow.array([1 << 63], pyarrow.uint64()), 1 << 63),
        "no number": (pyarrow.array([float("nan")]), None),
        "decimal": (pyarrow.array([decimal.Decimal("1.50")]), "1.50"),
        "truth": (pyarrow.array([True]), True),
        "nanoseconds": (pyarrow.array([1], pyarrow.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        "time zone": (pyarrow.array([0], pyarrow.timestamp("s", "UTC")), "1970-01-01 00:00:00.000Z"),
        "date": (pyarrow.array([moment.date()]), "2024-01-02"),
        "duration": (pyarrow.array([5], pyarrow.duration("s")), "5"),
        "nested moment": (pyarrow.array([{"at": moment}]), {"at": "2024-01-02T03:04:05"}),
        "nested decimal": (pyarrow.array([{"x": decimal.Decimal("1.5")}]), {"x": "1.5"}),
        "nothing": (pyarrow.nulls(1), None),
    }
    found = {name: values_of(column) for name, (column, _) in columns.items()}
    assert found == {name: [value] for name, (_, value) in columns.items()}


@pytest.mark.parametrize(
    "column",
    [
        undecodable(b"good", b"\xffb\nd", b"good"),
        pyarrow.array([b"good", b"\xffb\nd", b"good"]),
        pyarrow.array([[b"good"], [b"x", b"\xffb\nd"], [b"good"]]),
        pyarrow.StructArray.from_arrays([undecodable(b"good", b"\xffb\nd", b"good")], ["s"]),
        pyarrow.StructArray.from_arrays([pyarrow.array([b"good", b"\xffb\nd", b"good"])], ["s"]),
    ],
    ids=["text", "binary", "list", "struct of text", "struct of binary"],
)
def test_bytes_that_are_no_utf8_stay_in_the_line_of_their_row_alone(column: Any) -> None:
    lines = lines_of(put({"text": column, "number": [1, 2, 3]}), "text", "number")
    assert len(lines) == 3
    assert b"\xff" in lines[1]
    with pytest.raises(UnicodeDecodeError):
        lines[1].decode()
    assert [orjson.loads(line)["number"] for line in (lines[0], lines[2])] == [1, 3]


def rows_of(blocks: list[Block]) -> list[tuple[int, int, bytes]]:
    """Return each row's number, place and line, empty where it was too long; blocks are checked on the way."""
    found = []
    for block in blocks:
        lines = [b""] if block.too_long else block.content.splitlines(keepends=True)
        place = block.first_byte
        for number, line in enumerate(lines, start=block.first_record):
            found.append((number, place, line))
            place += len(line)
        assert block.too_long or block.end.content_bytes == place
        assert block.end.records == block.first_record - 1 + len(lines)
    assert [block.is_last for block in blocks] == [False] * (len(blocks) - 1) + [True]
    return found


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    group_rows=st.integers(1, 15),
    block_bytes=st.integers(1, 300),
    limit=st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_blocks_hold_all_rows_and_any_of_their_ends_is_a_place_to_go_on_from(
    sizes: list[int], group_rows: int, block_bytes: int, limit: int
) -> None:
    texts = [f"{number:03}" + "x" * size for number, size in enumerate(sizes)]
    source = put({"text": texts}, row_group_size=group_rows)
    rules = InputRules(block_bytes=block_bytes, max_document_bytes=limit)
    blocks = list(read_blocks(source, rules))
    whole, place = rows_of(blocks), 0
    for number, text in enumerate(texts, start=1):
        line = orjson.dumps({"text": text}) + b"\n"
        assert whole[number - 1] == (number, place, b"" if len(line) - 1 > limit else line)
        place += len(line)
    assert len(whole) == len(texts)
    assert all(len(block.content) <= block_bytes or block.content.count(b"\n") == 1 for block in blocks)
    digest = hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
    assert {block.end.digest for block in blocks} == {digest}
    assert blocks[-1].end.disk_bytes == source.size
    for index, block in enumerate(blocks):
        rest = list(read_blocks(source, rules, block.end))
        assert (
            rows_of(rest) == rows_of(blocks[index + 1 :]) if blocks[index + 1 :] else rest[0].content == b""
        )
        assert rest[-1].end == blocks[-1].end


@pytest.mark.parametrize(("limit", "kept"), [(12, True), (11, False)])
def test_the_limit_is_the_line_without_its_newline(limit: int, kept: bool) -> None:
    source = put({"text": ["a"]})
    (*_, block) = blocks = list(read_blocks(source, InputRules(max_document_bytes=limit)))
    assert b"".join(block.content for block in blocks) == (b'{"text":"a"}\n' if kept else b"")
    assert [block.too_long for block in blocks] == ([False] if kept else [True, False])
    assert (block.end.records, block.end.content_bytes, block.end.disk_bytes) == (1, 13, source.size)


def test_positions_go_by_the_share_of_rows() -> None:
    source = put({"text": ["x" * 100] * 100})
    ends = [block.end for block in read_blocks(source, InputRules(block_bytes=1200))]
    assert source.size is not None
    assert len(ends) > 5
    assert [end.disk_bytes for end in ends] == [source.size * end.records // 100 for end in ends]


def test_going_on_skips_whole_row_groups_without_reading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    source = put({"text": [str(n) for n in range(100)]}, row_group_size=10)
    blocks = list(read_blocks(source, InputRules(block_bytes=40)))
    asked: list[Any] = []

    class Watched(parquet.ParquetFile):
        def iter_batches(self, *arguments: Any, **options: Any) -> Any:
            asked.append(options["row_groups"])
            return super().iter_batches(*arguments, **options)

    monkeypatch.setattr(parquet, "ParquetFile", Watched)
    start = next(block.end for block in blocks if 70 <= block.end.records < 80)
    rest = list(read_blocks(source, RULES, start))
    assert rest[0].first_record == start.records + 1
    assert asked == [[7, 8, 9]]


def test_another_file_than_before_is_an_error_before_any_block() -> None:
    source = put({"text": ["a"] * 100})
    end = next(iter(read_blocks(source, InputRules(block_bytes=100)))).end
    other = put({"text": ["b"] * 100})
    with pytest.raises(ConfigError, match=r"^input a\.parquet has changed since the run"):
        next(read_blocks(other, RULES, end))


def test_a_file_that_grew_since_it_was_found_is_an_error() -> None:
    source = put({"text": ["a"]})
    with open(source.path, "ab") as stream:
        stream.write(b"more")
    with pytest.raises(ConfigError, match=r"a\.parquet changed while it was read"):
        next(read_blocks(source, RULES))


def test_a_file_without_rows_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"^input a\.parquet is empty, a parquet file without rows"):
        put({"text": pyarrow.array([], pyarrow.string())})


def test_a_file_without_pyarrow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_let.data.parquet.has_pyarrow", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^input a\.parquet is a parquet file: install the package pyarrow"
    ):
        put({"text": ["a"]})


def test_a_cut_file_is_an_error_when_it_is_found() -> None:
    source = put({"text": ["a" * 100] * 100})
    for size in (4, 20, (source.size or 0) - 1):
        os.truncate(source.path, size)
        with pytest.raises(ConfigError, match=r"^input a\.parquet is a damaged parquet file[^\n]+$"):
            find_sources([source.path], RULES)
        put({"text": ["a" * 100] * 100})


def test_damaged_pages_are_an_error_in_one_line() -> None:
    source = put({"text": [str(number) for number in range(1000)]})
    content = bytearray(Path(source.path).read_bytes())
    content[4:200] = b"\xff" * 196
    Path(source.path).write_bytes(content)
    with pytest.raises(ConfigError, match=r"^input a\.parquet is a damaged parquet file[^\n]+$"):
        list(read_blocks(source, RULES))


def test_columns_of_one_name_are_an_error() -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    parquet.write_table(table, "a.parquet")
    (source,) = find_sources(["a.parquet"], RULES)
    with pytest.raises(ConfigError, match=r"one of a kind that cannot be read: .+text"):
        list(read_blocks(source, RULES))


def test_memory_does_not_grow_with_the_row_group() -> None:
    text = os.urandom(10_000).hex()
    texts = [text[number:] + text[:number] for number in range(4000)]  # a file as large as its content
    source = put({"text": texts}, use_dictionary=False, compression="none")
    assert parquet.ParquetFile(source.path).num_row_groups == 1
    pool = pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    try:
        for block in read_blocks(source, RULES):
            most = max(most, pool.bytes_allocated() - before)
            assert len(block.content) <= RULES.block_bytes
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    # Of 80 MB in the group. Both are 21 to 25 MB for one of 320 MB as well.
    assert most < 30_000_000


def test_large_rows_behind_small_ones_are_decoded_a_few_at_a_time() -> None:
    # A dictionary holds each of the large texts once, and the file says nothing of their size.
    large = ["7 " * 500_000 + str(number) for number in range(3)]
    texts = ["1"] * 1000 + [large[number % 3] for number in range(300)] + ["2"] * 1000
    source = put({"text": texts}, row_group_size=1000)
    pool = pyarrow.default_memory_pool()
    before, most, kept = pool.bytes_allocated(), 0, 0
    tracemalloc.start()
    try:
        for block in read_blocks(source, RULES):
            most = max(most, pool.bytes_allocated() - before)
            kept += block.content.count(b"\n")
        assert tracemalloc.get_traced_memory()[1] < 80_000_000
    finally:
        tracemalloc.stop()
    assert kept == len(texts)
    assert (
        most < 40_000_000
    )  # 16 rows of a megabyte and the dictionary; by the file's own figures it was 100 rows
