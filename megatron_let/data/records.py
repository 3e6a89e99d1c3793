"""One JSON line to the texts of a document, or the reason why it gives none."""

from __future__ import annotations

import json
from typing import Any

from megatron_let.data.sources import Line

BLANK_LINE = "blank_line"
INVALID_UTF8 = "invalid_utf8"
INVALID_JSON = "invalid_json"
TRUNCATED_LAST_LINE = "truncated_last_line"
NOT_AN_OBJECT = "not_an_object"
MISSING_KEY = "missing_key"
NULL_TEXT = "null_text"
NOT_TEXT = "not_text"
EMPTY_TEXT = "empty_text"
LONE_SURROGATE = "lone_surrogate"
NO_TOKENS = "no_tokens"
NOT_ENCODABLE = "not_encodable"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RejectedRecord(Exception):
    """A record that gives no document; its only argument is the reason."""

    @property
    def reason(self) -> str:
        """Return the reason, one of this module's constants."""
        return str(self.args[0])


def parse_line(line: Line) -> dict[str, Any]:
    """Return the JSON object in one line.

    A byte order mark is dropped from a file's first line. A line without newline that does not parse is the mark
    of a file that was cut off.

    Raises:
        RejectedRecord: blank, not UTF-8, not JSON, or JSON but not an object.
    """
    content = line.content.removeprefix(_BYTE_ORDER_MARK) if line.number == 1 else line.content
    if not content.strip():
        raise RejectedRecord(BLANK_LINE)
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise RejectedRecord(TRUNCATED_LAST_LINE if line.is_cut else INVALID_UTF8) from None
    except (ValueError, RecursionError):  # ValueError: also a number of too many digits
        raise RejectedRecord(TRUNCATED_LAST_LINE if line.is_cut else INVALID_JSON) from None
    if not isinstance(record, dict):
        raise RejectedRecord(NOT_AN_OBJECT)
    return record


def texts_of(record: dict[str, Any], key: str) -> list[str]:
    """Return the document under `key`: one text, or a list of texts that become one sequence each, as in Megatron.

    Raises:
        RejectedRecord: the key is absent or does not hold text that can be encoded.
    """
    if key not in record:
        raise RejectedRecord(MISSING_KEY)
    value = record[key]
    if value is None:
        raise RejectedRecord(NULL_TEXT)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise RejectedRecord(NOT_TEXT)
    if not any(texts):
        raise RejectedRecord(EMPTY_TEXT)
    return texts


def utf8_size(texts: list[str]) -> int:
    """Return the texts' size in UTF-8 bytes.

    Raises:
        RejectedRecord: a text holds half a surrogate pair, which JSON can spell but UTF-8 cannot.
    """
    try:
        return sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
    except UnicodeEncodeError:
        raise RejectedRecord(LONE_SURROGATE) from None
