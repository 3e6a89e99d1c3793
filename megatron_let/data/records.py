"""A block's content to records: each has its number, its place, and its texts or the reason why it gives none."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from megatron_let.data.blocks import Block, RecordKind
from megatron_let.data.long_lines import (
    LONG_BYTES,
    LongText,
    Text,
    TooComplex,
    long_text,
    put_back,
    without_long_strings,
)

BLANK_LINE = "blank_line"
INVALID_UTF8 = "invalid_utf8"
INVALID_JSON = "invalid_json"
TRUNCATED_LAST_LINE = "truncated_last_line"
TOO_LONG = "too_long"
TOO_COMPLEX = "too_complex"
NOT_AN_OBJECT = "not_an_object"
MISSING_KEY = "missing_key"
NULL_TEXT = "null_text"
NOT_TEXT = "not_text"
EMPTY_TEXT = "empty_text"
LONE_SURROGATE = "lone_surrogate"
NO_TOKENS = "no_tokens"
NOT_ENCODABLE = "not_encodable"
TOO_LONG_TO_ENCODE = "too_long_to_encode"
EXCLUDED_SUBSET = "excluded_subset"

HARMLESS = frozenset({BLANK_LINE, EMPTY_TEXT, NO_TOKENS, EXCLUDED_SUBSET})
"""Nothing was lost with these: there was no text, or it was not wanted."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Characters whose UTF-8 size is counted, or bytes that are checked, at a time: no second copy of a huge text.
_SIZE_CHUNK = 1 << 20
_EMPTY_LINES = re.compile(rb"\n+")
# White space as bytes.strip() has it, and the byte behind it.
_FIRST_BYTE = re.compile(rb"[ \t\r\n\v\f]*(.?)", re.DOTALL)
# What a JSON value may begin with, the standard library's NaN and Infinity included.
_BEGINS_JSON = b'{["-0123456789tfnNI'
_BRACE = ord("{")


class RejectedRecord(Exception):
    """A record that gives no document; its only argument is the reason."""

    @property
    def reason(self) -> str:
        """Return the reason, one of this module's constants."""
        return str(self.args[0])


class Line(NamedTuple):
    """One line of a source, without its newline."""

    number: int
    byte: int
    """Where it begins in its source's content."""
    content: memoryview
    is_cut: bool
    """It had no newline: the source ends here, perhaps too early."""
    repeats: int = 1
    """How many lines: more than one only for empty lines that follow each other, this being the first."""


class Record(NamedTuple):
    """One record of a source: the values by key, or why there are none."""

    number: int
    byte: int
    """Where it begins in its source's content."""
    values: dict[str, Any]
    rejection: str
    """The reason, empty for a usable record."""
    repeats: int = 1
    """How many records: more than one only for empty lines that follow each other, this being the first."""

    def take_texts(self, key: str) -> list[str]:
        """Return the document under `key` as `take_long_texts` does, each text in one piece."""
        return [str(text) for text in self.take_long_texts(key)]

    def take_long_texts(self, key: str) -> list[Text]:
        """Return the document under `key` and forget it here: a huge text is then held by the caller alone.

        Raises:
            RejectedRecord: there is none, see `texts_of`.
        """
        if self.rejection:
            raise RejectedRecord(self.rejection)
        texts = texts_of(self.values, key)
        del self.values[key]
        return texts


def records_of(block: Block, *, text_key: str, replace_invalid_utf8: bool = False) -> Iterator[Record]:
    """Yield the block's records, the unusable ones too.

    text_key: the key under which a plain text appears, a text having no keys of its own.
    replace_invalid_utf8: put U+FFFD where bytes are not UTF-8, instead of rejecting the record.
    """
    if block.too_long:
        yield Record(block.first_record, block.first_byte, {}, TOO_LONG)
        return
    for line in _whole(block) if block.kind is RecordKind.TEXT_FILE else lines_of(block):
        is_json = block.kind is RecordKind.JSON_LINES
        if is_json and (reason := _reason_at_first_sight(line, replace_invalid_utf8)):
            yield Record(line.number, line.byte, {}, reason, line.repeats)
            continue
        try:
            if is_json:
                values = _parse_object(line, replace_invalid_utf8)
            else:
                values = {text_key: _text_of(line, block.kind, replace_invalid_utf8)}
            yield Record(line.number, line.byte, values, "")
        except RejectedRecord as rejected:
            yield Record(line.number, line.byte, {}, rejected.reason, line.repeats)


def lines_of(block: Block) -> Iterator[Line]:
    """Yield the block's lines, as views: a huge line is not copied. Empty lines that follow each other are one item."""
    content = block.content
    view = memoryview(content)
    number, start = block.first_record, 0
    while (end := content.find(b"\n", start)) >= 0:
        if end == start and (empty := _EMPTY_LINES.match(content, start)):
            count = empty.end() - start
            yield Line(number, block.first_byte + start, view[start:start], is_cut=False, repeats=count)
            number, start = number + count, start + count
            continue
        yield Line(number, block.first_byte + start, view[start:end], is_cut=False)
        number, start = number + 1, end + 1
    if start < len(content):
        yield Line(number, block.first_byte + start, view[start:], is_cut=True)


def parse_line(line: Line, *, replace_invalid_utf8: bool = False) -> dict[str, Any]:
    """Return the JSON object in one line.

    A byte order mark is dropped from a source's first line. A line without newline that does not parse is the mark
    of a source that was cut off.

    Raises:
        RejectedRecord: blank, not UTF-8, not JSON, JSON but not an object, or more than can be parsed.
    """
    if reason := _reason_at_first_sight(line, replace_invalid_utf8):
        raise RejectedRecord(reason)
    return _parse_object(line, replace_invalid_utf8)


def _parse_object(line: Line, replace_invalid_utf8: bool) -> dict[str, Any]:
    content = _without_mark(line)
    parse = _parse_long if len(content) > LONG_BYTES else _parse
    record = parse(content, line.is_cut, replace_invalid_utf8)
    if not isinstance(record, dict):
        raise RejectedRecord(NOT_AN_OBJECT)
    return record


def texts_of(record: Mapping[str, Any], key: str) -> list[Text]:
    """Return the document under `key`: one text, or a list of texts that become one sequence each, as in Megatron.

    Raises:
        RejectedRecord: the key is absent or does not hold text that can be encoded.
    """
    value = record.get(key)
    if isinstance(value, (str, LongText)) and value:
        return [value]
    if value is None:
        raise RejectedRecord(NULL_TEXT if key in record else MISSING_KEY)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, (str, LongText)) for text in texts):
        raise RejectedRecord(NOT_TEXT)
    if not any(texts):
        raise RejectedRecord(EMPTY_TEXT)
    return texts


def utf8_size(texts: Sequence[Text]) -> int:
    """Return the texts' size in UTF-8 bytes.

    Raises:
        RejectedRecord: a text holds half a surrogate pair, which JSON can spell but UTF-8 cannot.
    """
    try:
        return sum(map(_encoded_size, texts))
    except UnicodeEncodeError:
        raise RejectedRecord(LONE_SURROGATE) from None


def subset_of(record: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """Return the name at the end of a path of keys, or an empty string where there is none."""
    value: Any = record
    for key in path:
        if not isinstance(value, dict):
            return ""
        value = value.get(key)
    # A name that UTF-8 cannot hold could be written nowhere. One of megabytes is none.
    if not isinstance(value, str):
        return ""
    return value if value.isascii() else value.encode("utf-8", errors="replace").decode("utf-8")


def _reason_at_first_sight(line: Line, replace_invalid_utf8: bool) -> str:
    """Return why a line is rejected if its first byte tells, else "". Parsers raise, which takes many times longer."""
    content = _without_mark(line)
    if content and content[0] == _BRACE:
        return ""
    begin = _FIRST_BYTE.match(content)
    assert begin, "the pattern matches anything"
    if not begin[1]:
        return BLANK_LINE
    if begin[1] in _BEGINS_JSON:
        return ""
    is_readable = replace_invalid_utf8 or _is_utf8(content)
    reason = INVALID_JSON if is_readable else INVALID_UTF8
    return TRUNCATED_LAST_LINE if line.is_cut else reason


def _is_utf8(content: memoryview) -> bool:
    try:
        if len(content) <= _SIZE_CHUNK:
            str(content, "utf-8")
            return True
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(content), _SIZE_CHUNK):
            decoder.decode(content[start : start + _SIZE_CHUNK])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _parse_long(content: memoryview, is_cut: bool, replace_invalid_utf8: bool) -> Any:
    """Parse without the long strings, which are put back in pieces."""
    try:
        short, strings = without_long_strings(content, replace_invalid_utf8)
    except TooComplex:
        raise RejectedRecord(TOO_COMPLEX) from None
    except ValueError:
        is_readable = replace_invalid_utf8 or _is_utf8(content)
        reason = INVALID_JSON if is_readable else INVALID_UTF8
        raise RejectedRecord(TRUNCATED_LAST_LINE if is_cut else reason) from None
    return put_back(_parse(short, is_cut, replace_invalid_utf8), strings)


def _parse(content: memoryview | bytes, is_cut: bool, replace_invalid_utf8: bool) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        # The standard library takes more: NaN, half surrogate pairs. It decides.
        return _parse_slowly(bytes(content), is_cut, replace_invalid_utf8)


def _parse_slowly(content: bytes, is_cut: bool, replace_invalid_utf8: bool) -> Any:
    """Parse with the standard library, which decides what is valid."""
    try:
        return json.loads(content.decode("utf-8", errors="replace" if replace_invalid_utf8 else "strict"))
    except UnicodeDecodeError:
        raise RejectedRecord(TRUNCATED_LAST_LINE if is_cut else INVALID_UTF8) from None
    except (ValueError, RecursionError):  # ValueError: also a number of too many digits
        raise RejectedRecord(TRUNCATED_LAST_LINE if is_cut else INVALID_JSON) from None


def _whole(block: Block) -> Iterator[Line]:
    if block.content:
        yield Line(block.first_record, block.first_byte, memoryview(block.content), is_cut=False)


def _text_of(line: Line, kind: RecordKind, replace_invalid_utf8: bool) -> Text:
    """Return a plain text's record. A line may end in CR LF."""
    content = _without_mark(line)
    if kind is RecordKind.TEXT_LINES:
        if content[-1:] == b"\r":
            content = content[:-1]
        begin = _FIRST_BYTE.match(content)
        if begin and not begin[1]:
            raise RejectedRecord(BLANK_LINE)
    errors = "replace" if replace_invalid_utf8 else "strict"
    try:
        return str(content, "utf-8", errors) if len(content) <= LONG_BYTES else long_text(content, errors)
    except UnicodeDecodeError:
        raise RejectedRecord(INVALID_UTF8) from None


def _without_mark(line: Line) -> memoryview:
    return line.content[3:] if line.byte == 0 and line.content[:3] == _BYTE_ORDER_MARK else line.content


def _encoded_size(text: Text) -> int:
    if isinstance(text, LongText):
        if text.has_lone_surrogate:
            raise RejectedRecord(LONE_SURROGATE)
        return text.utf8_size()
    if text.isascii():
        return len(text)
    if len(text) <= _SIZE_CHUNK:
        return len(text.encode("utf-8"))
    return sum(
        len(text[start : start + _SIZE_CHUNK].encode("utf-8")) for start in range(0, len(text), _SIZE_CHUNK)
    )
