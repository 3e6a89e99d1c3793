"""Records: the fast parser takes and refuses exactly what the standard library does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_let.data import records
from megatron_let.data.blocks import START, Block, RecordKind
from megatron_let.data.records import Line, RejectedRecord, lines_of, parse_line, records_of, texts_of


def block_of(content: bytes, kind: RecordKind = RecordKind.JSON_LINES, byte: int = 0) -> Block:
    return Block("input", kind, 5, byte, content, too_long=False, is_last=True, end=START)


def line_of(content: bytes, *, is_cut: bool = False) -> Line:
    return Line(1, 0, memoryview(content), is_cut)


def test_lines_have_numbers_and_places() -> None:
    lines = list(lines_of(block_of(b"a\n\nbc", byte=100)))
    assert [(line.number, line.byte, bytes(line.content), line.is_cut) for line in lines] == [
        (5, 100, b"a", False),
        (6, 102, b"", False),
        (7, 103, b"bc", True),
    ]
    assert list(lines_of(block_of(b""))) == []


def test_empty_lines_that_follow_each_other_are_one_item() -> None:
    lines = list(lines_of(block_of(b"\n\n\na\n\n\n", byte=100)))
    assert [(line.number, line.byte, bytes(line.content), line.repeats) for line in lines] == [
        (5, 100, b"", 3),
        (8, 103, b"a", 1),
        (9, 105, b"", 2),
    ]
    found = list(records_of(block_of(b"\n\n{}\n\n"), text_key="text"))
    assert [(record.number, record.rejection, record.repeats) for record in found] == [
        (5, records.BLANK_LINE, 2),
        (7, "", 1),
        (8, records.BLANK_LINE, 1),
    ]


@given(content=st.binary(max_size=40), byte=st.integers(0, 10))
@settings(max_examples=50, deadline=None)
def test_lines_put_together_are_the_block(content: bytes, byte: int) -> None:
    content = content.replace(b"\x00", b"\n")
    lines = list(lines_of(block_of(content, byte=byte)))
    newlines = [b"" if line.is_cut else b"\n" * line.repeats for line in lines]
    assert b"".join(bytes(line.content) + end for line, end in zip(lines, newlines, strict=True)) == content
    for line in lines:
        start = line.byte - byte
        assert content[start : start + len(line.content)] == bytes(line.content)


def standard(content: bytes) -> Any:
    """Return what the standard library makes of one line, or the reason for refusing it."""
    if not content.strip():
        return records.BLANK_LINE
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        return records.INVALID_UTF8
    except (ValueError, RecursionError):
        return records.INVALID_JSON
    return record if isinstance(record, dict) else records.NOT_AN_OBJECT


def outcomes(record: Any) -> dict[str, Any]:
    """Return the texts under each key, or why there are none: all that a parser can make a difference to."""
    if isinstance(record, str):
        return {"": record}
    found: dict[str, Any] = {}
    for key in ["text", *record]:
        try:
            found[key] = texts_of(record, key)
        except RejectedRecord as rejected:
            found[key] = rejected.reason
    return found


def ours(content: bytes) -> Any:
    try:
        return parse_line(line_of(content))
    except RejectedRecord as rejected:
        return rejected.reason


AWKWARD_LINES = (
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "text": null}',
    b'{"text": null, "text": ["a", "b"]}',
    b'{"text": "a", "n": NaN, "m": -Infinity}',
    b'{"text": "a", "n": 1e999}',
    b'{"text": "a", "n": 123456789012345678901234567890}',
    b'{"text": "a", "n": ' + b"7" * 400 + b"}",
    b'{"text": "a", "n": ' + b"7" * 4301 + b"}",
    b'{"text": "a", "n": -' + b"7" * 4301 + b"}",
    b'{"text": "a", "n": 0.' + b"7" * 5000 + b"}",
    b'{"text": "a", "n": 01}',
    b'{"text": "a", "n": -0}',
    b'{"text": "a", "n": .5}',
    b'{"text": "a", "n": +1}',
    b'{"text": "\\ud83e\\udd16"}',
    b'{"text": "\\ud83e \\udd16"}',
    b'{"text": "\\udd16\\ud83e"}',
    b'{"text": "\\ud83e\\ud83e\\udd16"}',
    b'{"text": "\\u0000"}',
    b'{"text": "\\x41"}',
    b'{"text": "\\u00e"}',
    b'{"text": "\t"}',
    b'{"text": "a\x7f"}',
    b'{"text": "a",}',
    b"{'text': 'a'}",
    b'{"text": "a"}\x00',
    b'{"text": "a"}\x0c',
    b'\x0b{"text": "a"}',
    b'\xc2\xa0{"text": "a"}',
    b'{"text": "a"} // comment',
    b'{"text": "a"}{"text": "a"}',
    b'{"\\u0074ext": "a"}',
    b'{"\\ud800": "a", "text": "b"}',
    b'{"text": "\xf4\x90\x80\x80"}',
    b'{"text": "\xc0\x80"}',
    b'{"text": "\xef\xbf\xbe"}',
    b'{"text": ["a", "\\ud800"]}',
    b'{"": ""}',
    b"{}",
    b"\x0b\x0c",
    b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}",
)


@pytest.mark.parametrize("content", AWKWARD_LINES, ids=range(len(AWKWARD_LINES)))
def test_awkward_lines_are_read_as_the_standard_library_reads_them(content: bytes) -> None:
    assert outcomes(ours(content)) == outcomes(standard(content))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=6),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def nearly_json(draw: st.DrawFn) -> bytes:
    """A record, often with a few bytes put in, taken out or doubled."""
    record = draw(st.fixed_dictionaries({"text": json_values}) | json_values)
    text = json.dumps(record, ensure_ascii=draw(st.booleans()))
    content = bytearray(text.encode("utf-8", errors="surrogatepass"))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(content)))
        new = draw(st.sampled_from([b"", b'"', b"\\", b"\\u", b"d800", b"\xff", b"\x00", b"NaN", b"0", b","]))
        content[place : place + draw(st.integers(0, 2))] = new
    return bytes(content).replace(b"\n", b" ")


@given(content=nearly_json())
@settings(max_examples=400, deadline=None)
def test_any_line_is_read_as_the_standard_library_reads_it(content: bytes) -> None:
    assert outcomes(ours(content)) == outcomes(standard(content))


def test_invalid_utf8_can_be_replaced_instead_of_rejected() -> None:
    content = b'{"text": "a\xffb\xed\xa0\x80"}\nnot \xff json\n{"text": "\xe6\x97'
    rejected = list(records_of(block_of(content), text_key="text"))
    assert [record.rejection for record in rejected] == [
        records.INVALID_UTF8,
        records.INVALID_UTF8,
        records.TRUNCATED_LAST_LINE,
    ]
    replaced = list(records_of(block_of(content), text_key="text", replace_invalid_utf8=True))
    assert [record.rejection for record in replaced] == [
        "",
        records.INVALID_JSON,
        records.TRUNCATED_LAST_LINE,
    ]
    assert replaced[0].take_texts("text") == ["a\ufffdb\ufffd\ufffd\ufffd"]


def texts_and_reasons(block: Block, *, replace: bool = False) -> list[tuple[int, str]]:
    return [
        (record.number, record.rejection or record.take_texts("key")[0])
        for record in records_of(block, text_key="key", replace_invalid_utf8=replace)
    ]


def test_text_lines_are_one_document_each() -> None:
    block = block_of(b"\xef\xbb\xbfa b\r\n \t\r\n\xff\n\xef\xbb\xbfc", RecordKind.TEXT_LINES)
    assert texts_and_reasons(block) == [
        (5, "a b"),
        (6, records.BLANK_LINE),
        (7, records.INVALID_UTF8),
        (8, "\ufeffc"),
    ]
    assert texts_and_reasons(block, replace=True)[2] == (7, "\ufffd")


def test_a_text_file_is_one_document_kept_exactly() -> None:
    assert texts_and_reasons(block_of(b"\xef\xbb\xbf\r\n a\n", RecordKind.TEXT_FILE)) == [(5, "\r\n a\n")]
    assert texts_and_reasons(block_of(b"a\xff", RecordKind.TEXT_FILE)) == [(5, records.INVALID_UTF8)]
    assert texts_and_reasons(block_of(b"", RecordKind.TEXT_FILE)) == []


def test_the_size_of_a_long_text_is_that_of_its_utf8() -> None:
    text = "a\u00e9\u65e5\U0001f916" * 300_000
    assert records.utf8_size([text, "b"]) == len(text.encode()) + 1
    with pytest.raises(RejectedRecord, match=records.LONE_SURROGATE):
        records.utf8_size([text + "\ud800"])
