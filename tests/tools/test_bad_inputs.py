"""Every kind of bad input known: the program ends in time, with nothing lost that is not counted and named.

Two hundred good records; where a bad one is added it stands after fifty. Run as a program, since what other tools do with
many of these is to wait for ever.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_let.data.indexed import check_indexed
from megatron_let.data.manifest import read_manifest
from tests.processes import HANG_SECONDS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"

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
    is_piped: bool = False
    """Comes through standard input."""
    is_hugging_face: bool = False
    """Encoded by a Hugging Face tokenizer: texts are texts, not numbers."""

    @property
    def source(self) -> str:
        """Return what the examples of what was skipped call it."""
        return "-" if self.is_piped else f"/{self.name}"


def with_line(line: bytes) -> bytes:
    return joined([*GOOD[:50], line, *GOOD[50:]])


def joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def parquet_of(**columns: list[object]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


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
    # Lines that hold nothing, many and long.
    "two million blank lines": Row(WHOLE + b"\n" * 2_000_000, skipped={"blank_line": 2_000_000}),
    "20 MB of spaces on a line": Row(with_line(b" " * 20_000_000), skipped={"blank_line": 1}),
    # Two workers.
    "bad lines for two workers": Row(
        with_line(b"hello") + b"\n\n" + with_line(b"\xff"),
        documents=400,
        skipped={"blank_line": 2, "invalid_json": 1, "invalid_utf8": 1},
        flags=("--workers", "2"),
    ),
    "stop with two workers": Row(
        with_line(b"{broken"), error="input.jsonl:51 (byte ", flags=("--on-error", "stop", "--workers", "2")
    ),
    # Standard input.
    "bad lines through a pipe": Row(with_line(b"hello"), skipped={"invalid_json": 1}, is_piped=True),
    "zstd through a pipe": Row(ZSTD, is_piped=True),
    "truncated gzip through a pipe": Row(gzip.compress(WHOLE)[:-9], error="standard input", is_piped=True),
    "an empty pipe": Row(b"", error="standard input", is_piped=True),
    # Parquet.
    "parquet with nulls and empty texts": Row(
        parquet_of(text=["1 2", None, "", "3"]),
        documents=2,
        skipped={"empty_text": 1, "null_text": 1},
        name="input.parquet",
    ),
    "parquet of numbers": Row(parquet_of(text=[1, 2]), error="no document has text", name="input.parquet"),
    "parquet of another column": Row(
        parquet_of(content=["1"]), error='under the key "text"', name="input.parquet"
    ),
    "parquet without rows": Row(parquet_of(text=[]), error="is empty", name="input.parquet"),
    "json lines named parquet": Row(WHOLE, error="is not a parquet file", name="input.parquet"),
    "half a parquet file": Row(parquet_of(text=["1"])[:-20], error="input.parquet", name="input.parquet"),
    # Plain text.
    "a text": Row(b"1 2 3\n", documents=1, name="input.txt"),
    "lines of text": Row(
        b"1 2\n\n\xff\nhello\n3",
        documents=2,
        skipped={"blank_line": 1, "invalid_utf8": 1, "not_encodable": 1},
        name="input.txt",
        flags=("--text-documents", "line"),
    ),
    "a text that is not utf-8": Row(b"1 \xff 2", error="no document has text", name="input.txt"),
    # A Hugging Face tokenizer.
    "bad records through a pipe to two workers with a tokenizer": Row(
        joined(
            [
                b'{"text": "\\ud800"}',
                b'{"text": ""}',
                b'{"text": "\\u0000"}',
                b'{"text": "<|endoftext|>"}',
                b"{",
                *GOOD,
            ]
        ),
        documents=202,
        skipped={"empty_text": 1, "invalid_json": 1, "lone_surrogate": 1},
        flags=("--workers", "2"),
        is_piped=True,
        is_hugging_face=True,
    ),
    "a text of spaces too long to encode": Row(
        with_line(b'{"text": "' + b" " * 3_000_000 + b'"}'),
        skipped={"too_long_to_encode": 1},
        is_hugging_face=True,
    ),
}


def run(*arguments: object, piped: bytes | None = None) -> tuple[int, str]:
    """Run the tool, return its status and stderr; a hang is an error of this call."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, timeout=HANG_SECONDS, capture_output=True, input=piped)
    return done.returncode, done.stderr.decode()


def flags_of(row: Row, tokenizer: Path) -> tuple[object, ...]:
    if row.is_hugging_face:
        return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, *row.flags)
    return ("--tokenizer-type", "NullTokenizer", "--vocab-size", 1000, *row.flags)


@pytest.mark.parametrize("case", list(ROWS))
def test_a_bad_input_is_counted_or_refused_in_time(
    tmp_path: Path, tokenizer_directory: Path, case: str
) -> None:
    row = ROWS[case]
    (tmp_path / row.name).write_bytes(row.content)
    status, said = run(
        *("--input", "-" if row.is_piped else tmp_path / row.name),
        *("--output-prefix", tmp_path / "out", "--append-eod", *flags_of(row, tokenizer_directory)),
        piped=row.content if row.is_piped else None,
    )
    if row.error:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2, said
        assert len(lines) == 1
        assert row.error in lines[0]
        assert [path.name for path in tmp_path.iterdir()] == [row.name]
        return
    assert status == 0, said
    prefix = str(tmp_path / "out_text_document")
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert (manifest.documents, manifest.skipped) == (row.documents, row.skipped)
    assert manifest.records == manifest.documents + sum(manifest.skipped.values())
    assert check_indexed(prefix).documents == row.documents
    assert len(manifest.skipped_examples) == min(10, sum(row.skipped.values()))
    assert all(f"{row.source}:" in example for example in manifest.skipped_examples)


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
        status, said = run("--input", *(tmp_path / name for name in names), *flags)
        assert status == 2
        assert message in said
        assert said.count("\n") == 1
