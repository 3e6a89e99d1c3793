"""Long lines: read as the short ones are, in pieces, and refused where they would take gigabytes."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_let.data import long_lines, records
from megatron_let.data.blocks import START, Block, RecordKind
from megatron_let.data.long_lines import LongText, TooComplex, long_text, without_long_strings
from megatron_let.data.records import Line, RejectedRecord, parse_line, records_of, subset_of, utf8_size
from tests.data.test_records import AWKWARD_LINES, nearly_json


def plain(value: Any) -> Any:
    """Return a value with its long texts as str."""
    if isinstance(value, LongText):
        return str(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def outcome(content: bytes, replace: bool = False, is_cut: bool = False) -> str:
    """Return the parsed line in words, so that NaN is as good as NaN, or why there is none."""
    try:
        return repr(plain(parse_line(Line(1, 0, memoryview(content), is_cut), replace_invalid_utf8=replace)))
    except RejectedRecord as rejected:
        return rejected.reason


def outcome_as_long(content: bytes, size: int, replace: bool = False, is_cut: bool = False) -> str:
    """Return the outcome where all lines are long, and strings of more than `size` bytes, at least one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lines, "LONG_BYTES", size)
        patch.setattr(records, "LONG_BYTES", 0)
        return outcome(content, replace, is_cut)


ESCAPES = ("\\u00e9", "\\ud83e\\udd16", "\\ud83e", "\\udd16", "\\\\", '\\"', "\\n", "\\\\ud83e", "\\/")
CHARACTERS = ("a", " ", "\u00e9", "\u65e5", "\U0001f916", "word word word", "{[,:]}", "\t", "\\x", '"')
literals = st.lists(st.sampled_from(ESCAPES + CHARACTERS[:7]) | st.sampled_from(CHARACTERS), max_size=40)


@st.composite
def long_strings(draw: st.DrawFn) -> bytes:
    """A line with strings that are cut everywhere, now and then with bytes that are not UTF-8."""
    texts = draw(st.lists(literals.map("".join), min_size=1, max_size=3))
    content = bytearray(('{"text":["' + '", "'.join(texts) + '"] , "n":{"x":[NaN,1]}}').encode())
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.integers(0, len(content)))
        content[place:place] = draw(st.sampled_from([b"\xff", b"\xe6\x97", b"\xa5", b"\xed\xa0\x80", b"\\"]))
    return bytes(content)


@given(
    content=nearly_json() | long_strings(),
    size=st.integers(5, 40),
    flags=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_long_line_is_read_as_a_short_one(content: bytes, size: int, flags: tuple[bool, bool]) -> None:
    found = outcome_as_long(content, size, *flags)
    assert found == outcome(content, *flags) or found == records.TOO_COMPLEX


@pytest.mark.parametrize("content", AWKWARD_LINES, ids=range(len(AWKWARD_LINES)))
def test_awkward_lines_are_read_alike(content: bytes) -> None:
    assert outcome_as_long(content, 1 << 10) == outcome(content)
    assert outcome_as_long(content, 6) in (outcome(content), records.TOO_COMPLEX)


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=60),
    ends=st.tuples(st.integers(0, 70), st.integers(0, 70)),
)
@settings(max_examples=200, deadline=None)
def test_slices_are_those_of_the_text(text: str, ends: tuple[int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lines, "LONG_BYTES", 4)
        found = long_text(memoryview(text.encode()), "strict")
    start, stop = ends
    assert (len(found), str(found), found[start:stop]) == (len(text), text, text[start:stop])
    assert utf8_size([found]) == len(text.encode())


def test_one_emoji_does_not_make_a_long_text_four_times_as_large() -> None:
    text = "\U0001f916" + "the quick brown fox " * 1_000_000
    content = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
    for kind in (RecordKind.JSON_LINES, RecordKind.TEXT_LINES, RecordKind.TEXT_FILE):
        block = Block("input", kind, 1, 0, content, too_long=False, is_last=True, end=START)
        tracemalloc.start()
        try:
            (record,) = records_of(block, text_key="text")
            (found,) = record.take_long_texts("text")
            assert tracemalloc.get_traced_memory()[1] < 2 * len(content)
        finally:
            tracemalloc.stop()
        if kind is RecordKind.JSON_LINES:
            assert str(found) == text


def test_half_a_surrogate_pair_in_a_long_text_is_found_where_it_is_the_text_asked_for() -> None:
    long = b"x" * (2 << 20)
    block = Block(
        "input",
        RecordKind.JSON_LINES,
        1,
        0,
        b'{"text": "' + long + b'\\ud83e", "other": "' + long + b'"}\n',
        too_long=False,
        is_last=True,
        end=START,
    )
    (record,) = records_of(block, text_key="text")
    with pytest.raises(RejectedRecord, match=records.LONE_SURROGATE):
        utf8_size(record.take_long_texts("text"))
    assert utf8_size(record.take_long_texts("other")) == len(long)
    assert subset_of({"text": LongText(["x"])}, ("text",)) == ""


@pytest.mark.parametrize("value", [b"{},", b"[0],", b'"a", ', b'{"a":1},', b"1,"])
def test_more_values_than_memory_allows_are_refused_before_they_are_parsed(
    value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_lines, "MAX_VALUES", 300_000)
    monkeypatch.setattr(orjson, "loads", None)
    content = b'{"text": "1", "x": [' + value * 1_000_000 + b"0]}"
    assert outcome(content) == records.TOO_COMPLEX


def test_separators_within_texts_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_lines, "MAX_VALUES", 10)
    text = '{[,:"\\' * 500_000
    assert outcome(json.dumps({"text": text, "more": [text[:50]] * 3}).encode()) == repr(
        {"text": text, "more": [text[:50]] * 3}
    )


def test_a_long_key_is_refused() -> None:
    with pytest.raises(TooComplex):
        without_long_strings(memoryview(b'{"' + b"k" * (2 << 20) + b'" : 1}'), replace_invalid_utf8=False)


@pytest.mark.parametrize("escape", ["\\\\", '\\"', "\\u65e5", "\\ud83e\\udd16"])
def test_a_long_text_of_escapes_alone_is_read(escape: str) -> None:
    content = b'{"text": "' + escape.encode() * 600_000 + b'", "n": 1}'
    assert outcome(content) == repr({"text": json.loads(f'"{escape}"') * 600_000, "n": 1})
    for cut in (3, 10, 11, 12):
        assert outcome(content[:-cut], is_cut=True) == records.TRUNCATED_LAST_LINE
