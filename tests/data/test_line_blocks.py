"""Pieces of whole lines: any chunks, any sizes, and a line that is too long takes nothing along."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data.line_blocks import Piece, cut_lines, whole_text

LINES = st.lists(st.integers(0, 30).map(lambda size: b"x" * size), max_size=25)


def expected_lines(content: bytes, limit: int) -> list[bytes | None]:
    """Return the lines with their newlines, None where one is above the limit."""
    lines = [line for line in content.splitlines(keepends=True) if line]
    return [None if len(line.rstrip(b"\n")) > limit else line for line in lines]


def lines_of(pieces: list[Piece]) -> list[bytes | None]:
    """Return the same of the pieces, each checked against its own counts."""
    found: list[bytes | None] = []
    for piece in pieces:
        lines = piece.content.splitlines(keepends=True)
        assert piece.num_records == len(lines) + (piece.dropped_bytes > 0)
        assert not (lines and piece.dropped_bytes)
        found += [None] if piece.dropped_bytes else lines
    return found


@given(
    lines=LINES,
    ends_with_newline=st.booleans(),
    chunk_bytes=st.integers(1, 50),
    block_bytes=st.integers(1, 60),
    limit=st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_any_chunks_give_the_same_lines(
    lines: list[bytes], ends_with_newline: bool, chunk_bytes: int, block_bytes: int, limit: int
) -> None:
    content = b"\n".join(lines) + b"\n" * ends_with_newline
    chunks = [content[begin : begin + chunk_bytes] for begin in range(0, len(content), chunk_bytes)]
    pieces = list(cut_lines(iter(chunks), block_bytes, limit))
    assert lines_of(pieces) == expected_lines(content, limit)
    assert sum(piece.num_bytes for piece in pieces) == len(content)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.content.endswith(b"\n") or piece.dropped_bytes for piece in pieces[:-1])
    for piece in pieces:
        assert len(piece.content) <= block_bytes or piece.content.count(b"\n") <= 1


def test_blocks_are_nearly_full() -> None:
    content = b"0123456789\n" * 10_000
    chunks = [content[begin : begin + 777] for begin in range(0, len(content), 777)]
    sizes = [len(piece.content) for piece in cut_lines(iter(chunks), 1000, 500)]
    assert max(sizes) <= 501  # no more than the longest line, so that only a line alone can be too long
    sizes = [len(piece.content) for piece in cut_lines(iter(chunks), 1000, 5000)]
    assert all(980 < size <= 1000 for size in sizes[:-1])


def test_the_limit_is_the_line_without_its_newline() -> None:
    for end in (b"", b"\n", b"\n{}\n"):
        assert next(cut_lines(iter([b"x" * 50 + end]), 10, 50)).content.rstrip(b"\n{}") == b"x" * 50
        assert next(cut_lines(iter([b"x" * 51 + end]), 10, 50)).dropped_bytes == 51 + (end != b"")


def test_no_content_is_one_last_piece_without_records() -> None:
    assert list(cut_lines(iter([]), 10, 10)) == [Piece(b"", num_records=0, is_last=True)]
    assert whole_text(iter([]), 10) == Piece(b"", num_records=0, is_last=True)


def test_a_long_line_costs_memory_once_and_one_above_the_limit_little() -> None:
    chunk = b"x" * 100_000
    tracemalloc.start()
    try:
        piece = next(cut_lines((chunk[:-1] + b"y" for _ in range(300)), 1000, 40_000_000))
        assert len(piece.content) == 30_000_000
        assert tracemalloc.get_traced_memory()[1] < 65_000_000  # the chunks and their join
        del piece
        tracemalloc.reset_peak()
        piece = next(cut_lines((chunk[:-1] + b"y" for _ in range(300)), 1000, 1_000_000))
        assert piece.dropped_bytes == 30_000_000
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_the_time_for_a_long_line_grows_with_its_length_only() -> None:
    before = time.process_time()
    (piece,) = cut_lines((b"x" * 999 + b"y" for _ in range(30_000)), 1000, 40_000_000)
    assert len(piece.content) == 30_000_000
    assert time.process_time() - before < 2  # 0.02 s; a join for every chunk would copy 450 GB


@pytest.mark.parametrize(("limit", "kept"), [(30, True), (29, False)])
def test_a_whole_text_is_one_record(limit: int, kept: bool) -> None:
    piece = whole_text(iter([b"0123456789"] * 3), limit)
    assert piece.content == (b"0123456789" * 3 if kept else b"")
    assert (piece.num_records, piece.num_bytes, piece.is_last) == (1, 30, True)
    assert (piece.dropped_bytes > 0) is not kept
