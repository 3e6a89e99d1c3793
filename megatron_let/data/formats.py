"""What content is by its first bytes, so that a format which cannot be read is named instead of read as lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from megatron_let.data.decompression import GZIP_MAGIC, ZSTD_MAGIC
from megatron_let.errors import ConfigError

PARQUET_MAGIC = b"PAR1"
HEAD_BYTES = 512

# The first that fits is meant: the mark of UTF-32 begins with that of UTF-16.
_REFUSED = (
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it or compress it with gzip or zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it or compress it with gzip or zstd"),
    (b"ARROW1", "an Arrow file", "convert it to parquet or JSON lines"),
    (b"PARE", "an encrypted parquet file", "decrypt it"),
    (b"version https://git-lfs", "a Git LFS pointer and not the data", "run git lfs pull"),
    (b"\xff\xfe\0\0", "text in UTF-32", "convert it to UTF-8"),
    (b"\0\0\xfe\xff", "text in UTF-32", "convert it to UTF-8"),
    (b"\xff\xfe", "text in UTF-16", "convert it to UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "convert it to UTF-8"),
    (GZIP_MAGIC, "compressed twice", "decompress it once"),
    (ZSTD_MAGIC, "compressed twice", "decompress it once"),
    (PARQUET_MAGIC, "a parquet file", "give it as a file of its own, not compressed and not through a pipe"),
)
# Three letters alone could begin a text.
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
_MARK = b"\xef\xbb\xbf"
# First lines that no JSON lines have. A header of CSV is names and separators, and what follows it no object.
_OTHER_TEXTS = (
    ("a JSON array", re.compile(rb"\s*\[\s*(\{|[\r\n])")),
    ("JSON over several lines", re.compile(rb'\s*\{[ \t]*\r?\n\s*(\}|"[^"\n]*"\s*:)')),
    ("XML or HTML", re.compile(rb"\s*<(\?xml|!doctype|html)", re.IGNORECASE)),
    ("a table in CSV", re.compile(rb'"?[A-Za-z_][\w .-]*"?([,;\t]"?[\w .-]+"?)+\r?\n(?!\s*[{\[])')),
)
_TAR_OFFSET, _TAR_MAGIC = 257, b"ustar"


class EmptyInput(ConfigError):
    """An input without any content."""

    def __init__(self, name: str, what: str = "") -> None:
        super().__init__(f"input {name} is empty{what}: leave it out")


def checked_content(chunks: Iterator[bytes], name: str, *, is_json: bool) -> Iterator[bytes]:
    """Return the same content, once its beginning is known to be that of JSON lines (`is_json`) or text.

    Raises:
        EmptyInput: there is no content.
        ConfigError: it is of another format.
    """
    first, size = list[bytes](), 0
    while size < HEAD_BYTES and (chunk := next(chunks, b"")):
        first.append(chunk)
        size += len(chunk)
    require_readable(b"".join(first)[:HEAD_BYTES], name, is_json=is_json)
    return chain(first, chunks)


def require_readable(head: bytes, name: str, *, is_json: bool) -> None:
    """Check the first bytes of an input's content, after decompression.

    Raises:
        EmptyInput: there are none.
        ConfigError: they are those of another format.
    """
    if not head:
        raise EmptyInput(name)
    found = _refused_format(head)
    if not found and is_json and (other := _other_text(head)):
        raise ConfigError(
            f"input {name} is {other}, and JSON lines are needed, one object a line with the text under a key: convert it "
            "(jq -c, pandas to_json with orient='records' and lines=True)"
        )
    if found:
        raise ConfigError(
            f"input {name} is {found[0]}; JSON lines and text in UTF-8 (plain, gzip or zstd) and parquet can be "
            f"read: {found[1]}"
        )


def _other_text(head: bytes) -> str:
    """Return what text in place of JSON lines is by its first lines, "" if it may be JSON lines, damaged ones too."""
    return next((what for what, pattern in _OTHER_TEXTS if pattern.match(head.removeprefix(_MARK))), "")


def _refused_format(head: bytes) -> tuple[str, str] | None:
    """Return what the content is and what to do about it, None if it can be read."""
    for magic, what, advice in _REFUSED:
        if head.startswith(magic):
            return what, advice
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        return "compressed with bzip2", "decompress it or compress it with gzip or zstd"
    if head[_TAR_OFFSET:].startswith(_TAR_MAGIC):
        return "a tar archive", "unpack it"
    return None
