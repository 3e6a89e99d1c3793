"""Every kind of bad input known: the program ends in time, with nothing lost that is not counted and named.

Two hundred good records; where a bad one is added it stands after fifty. Run as a program, since what other tools do with
many of these is to wait for ever.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard

from megatron_let.data.indexed import check_indexed
from megatron_let.data.manifest import read_manifest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
LIMIT_SECONDS = 20
GOOD = tuple(json.dumps({"text": f"{number} 7"}).encode() for number in range(200))


@dataclass(frozen=True)
class Row:
    """A file and what must come of it: so many documents and these skipped, or an error that says this."""

    content: bytes
    documents: int = 200
    skipped: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    flags: tuple[str, ...] = ()
    name: str = "input.jsonl"


def with_line(line: bytes) -> bytes:
    return joined([*GOOD[:50], line, *GOOD[50:]])


def joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


WHOLE = joined([*GOOD])
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(WHOLE)
FLIPPED = bytes(byte ^ (0x10 if index == len(ZSTD) // 2 else 0) for index, byte in enumerate(ZSTD))

ROWS = {
    "malformed json": Row(with_line(b'{"text": '), skipped={"invalid_json": 1}),
    "not json at all": Row(with_line(b"hello"), skipped={"invalid_json": 1}),
    "json twice on a line": Row(with_line(b'{"text": "1"}{"text": "2"}'), skipped={"invalid_json": 1}),
    "truncated last line": Row(WHOLE + b'{"text": "1', skipped={"truncated_last_line": 1}),
    "no newline at the end": Row(WHOLE[:-1]),
    "null text": Row(with_line(b'{"text": null}'), skipped={"null_text": 1}),
    "missing key": Row(with_line(b'{"txt": "1"}'), skipped={"missing_key": 1}),
    "key in another case": Row(with_line(b'{"Text": "1"}'), skipped={"missing_key": 1}),
    "invalid utf-8": Row(with_line(b'{"text": "\xff\xfe"}'), skipped={"invalid_utf8": 1}),
    "invalid utf-8 replaced": Row(
        with_line(b'{"text": "\xff\xfe"}'), skipped={"not_encodable": 1}, flags=("--invalid-utf8", "replace")
    ),
    "a number": Row(with_line(b'{"text": 17}'), skipped={"not_text": 1}),
    "an object": Row(with_line(b'{"text": {"a": "1"}}'), skipped={"not_text": 1}),
    "a list with a number": Row(with_line(b'{"text": ["1", 2]}'), skipped={"not_text": 1}),
    "a list of texts": Row(with_line(b'{"text": ["1", "2"]}'), documents=201),
    "a list at the top": Row(with_line(b'["text", "1"]'), skipped={"not_an_object": 1}),
    "blank line": Row(with_line(b""), skipped={"blank_line": 1}),
    "line of spaces": Row(with_line(b" \t\r"), skipped={"blank_line": 1}),
    "empty text": Row(with_line(b'{"text": ""}'), skipped={"empty_text": 1}),
    "lone surrogate": Row(with_line(b'{"text": "\\ud800"}'), skipped={"lone_surrogate": 1}),
    "nul byte in json": Row(with_line(b'{"text": "1\x00"}'), skipped={"invalid_json": 1}),
    "line of nul bytes": Row(with_line(b"\x00" * 1000), skipped={"invalid_json": 1}),
    "nested deeply": Row(with_line(b'{"text": "1", "x": ' + b"[" * 100_000), skipped={"invalid_json": 1}),
    "a number of many digits": Row(
        with_line(b'{"text": "1", "x": ' + b"9" * 5000 + b"}"), skipped={"invalid_json": 1}
    ),
    "not a number": Row(with_line(b'{"text": "1", "x": NaN}'), documents=201),
    "windows line ends": Row(WHOLE.replace(b"\n", b"\r\n")),
    "byte order mark": Row(b"\xef\xbb\xbf" + WHOLE),
    "too long": Row(
        with_line(b'{"text": "' + b"7 " * 20_000_000 + b'7"}'),
        skipped={"too_long": 1},
        flags=("--max-document-bytes", "1000000"),
    ),
    "an id outside the vocabulary": Row(with_line(b'{"text": "70000"}'), skipped={"not_encodable": 1}),
    "misnamed gzip": Row(gzip.compress(WHOLE)),
    "misnamed zstd": Row(ZSTD),
    "two zstd frames": Row(ZSTD + ZSTD, documents=400),
    "wrong key": Row(
        WHOLE, error='no document has text under the key "content"', flags=("--json-keys", "content")
    ),
    "empty file": Row(b"", error="is empty"),
    "empty after decompression": Row(gzip.compress(b""), error="input.jsonl"),
    "nothing but blank lines": Row(b"\n" * 100, error="no document has text"),
    "truncated gzip": Row(gzip.compress(WHOLE)[:-9], error="cut off or damaged"),
    "truncated zstd": Row(ZSTD[:-9], error="cut off or damaged"),
    "damaged zstd": Row(FLIPPED, error="cut off or damaged"),
    "bytes behind gzip": Row(gzip.compress(WHOLE) + b"rest", error="input.jsonl"),
    "utf-16": Row(WHOLE.decode().encode("utf-16"), error="UTF-16"),
    "zip": Row(b"PK\x03\x04" + WHOLE, error="zip"),
    "parquet cut off": Row(b"PAR1" + WHOLE, error="input.jsonl"),
    "stop at the first": Row(
        with_line(b"{broken"), error="input.jsonl:51 (byte ", flags=("--on-error", "stop")
    ),
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the tool; a hang is an error of this call."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, timeout=LIMIT_SECONDS, capture_output=True, text=True)


@pytest.mark.parametrize("case", list(ROWS))
def test_a_bad_input_is_counted_or_refused_in_time(tmp_path: Path, case: str) -> None:
    row = ROWS[case]
    (tmp_path / row.name).write_bytes(row.content)
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 1000, "--append-eod", *row.flags)
    result = run("--input", tmp_path / row.name, "--output-prefix", tmp_path / "out", *flags)
    if row.error:
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2, result.stderr
        assert len(lines) == 1
        assert row.error in lines[0]
        assert [path.name for path in tmp_path.iterdir()] == [row.name]
        return
    assert result.returncode == 0, result.stderr
    prefix = str(tmp_path / "out_text_document")
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert (manifest.documents, manifest.skipped) == (row.documents, row.skipped)
    assert manifest.records == manifest.documents + sum(manifest.skipped.values())
    assert check_indexed(prefix).documents == row.documents
    assert len(manifest.skipped_examples) == sum(row.skipped.values())
    assert all("input.jsonl:" in example for example in manifest.skipped_examples)


def test_inputs_that_are_no_files_are_refused_in_time(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jsonl").write_bytes(WHOLE)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    (tmp_path / "c.jsonl").write_bytes(WHOLE)
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 1000, "--output-prefix", tmp_path / "out")
    for names, message in (
        (["absent.jsonl"], "does not exist"),
        (["*.txt"], "matches no file"),
        (["empty"], "holds no file of a known kind"),
        (["pipe"], "is a pipe"),
        (["a.jsonl", "a.jsonl"], "is given twice"),
        (["a.jsonl", "b.jsonl"], "is the same file as"),
        (["a.jsonl", "c.jsonl"], "have the same content"),
    ):
        result = run("--input", *(tmp_path / name for name in names), *flags)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
