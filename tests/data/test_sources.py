"""Inputs found and checked before any work: formats, what cannot be read, and nothing counted twice."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_let.data.blocks import RecordKind
from megatron_let.data.input_rules import FoundSource, InputRules
from megatron_let.data.readers import read_blocks
from megatron_let.data.sources import find_inputs, find_sources
from megatron_let.errors import ConfigError
from tests.data.standard_input import piped_standard_input

CONTENT = b'{"text": "a"}\n'
RULES = InputRules()


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(path: str, content: bytes = CONTENT) -> str:
    Path(path).write_bytes(content)
    return path


def refuse(message: str, *inputs: str, rules: InputRules = RULES) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        find_sources(inputs, rules)
    assert "\n" not in str(error.value)


def test_sources_come_with_what_is_known_of_them() -> None:
    put("b.jsonl")
    put("a", gzip.compress(CONTENT * 2))
    status = os.stat("b.jsonl")
    first, second = find_sources(["b.jsonl", "a"], RULES)
    assert first == FoundSource("b.jsonl", len(CONTENT), status.st_mtime_ns, RecordKind.JSON_LINES, False)
    assert (second.path, second.size) == ("a", os.stat("a").st_size)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize(
    ("name", "rules", "kind"),
    [
        ("a.jsonl", RULES, RecordKind.JSON_LINES),
        ("a", RULES, RecordKind.JSON_LINES),
        ("a.txt", RULES, RecordKind.TEXT_FILE),
        ("a.TXT.gz", RULES, RecordKind.TEXT_FILE),
        ("a.txt.zst", InputRules(text_documents="line"), RecordKind.TEXT_LINES),
        ("a.jsonl", InputRules(text_documents="line"), RecordKind.JSON_LINES),
        ("a.txt", InputRules(input_format="jsonl"), RecordKind.JSON_LINES),
        ("a.md", InputRules(input_format="text"), RecordKind.TEXT_FILE),
        ("a.jsonl", InputRules(input_format="text", text_documents="line"), RecordKind.TEXT_LINES),
    ],
)
def test_the_kind_goes_by_the_rules_and_the_name_and_never_by_the_compression(
    compress: Callable[[bytes], bytes], name: str, rules: InputRules, kind: RecordKind
) -> None:
    (source,) = find_sources([put(name, compress(CONTENT))], rules)
    assert (source.kind, source.is_parquet) == (kind, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"input_format": "json"}, "input format json: give one of auto, jsonl, parquet, text"),
        ({"text_documents": "page"}, "text documents page: give one of file, line"),
        ({"max_document_bytes": 0}, "at most 0 bytes a document .+ at least 1"),
        ({"block_bytes": 0}, "0 a block: both must be at least 1"),
    ],
)
def test_impossible_rules_are_errors(words: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InputRules(**words)  # type: ignore[arg-type]


def test_what_is_no_readable_file_is_an_error() -> None:
    os.mkfifo("fifo")
    os.symlink("absent", "broken")
    refuse("^input absent does not exist", "absent")
    refuse("^input broken does not exist", "broken")
    refuse("^input fifo is a pipe: give - as the input and pipe", "fifo")
    refuse("^input /dev/null is not a regular file", "/dev/null")
    refuse(r"^input empty\.jsonl is empty: leave it out", put("empty.jsonl", b""))
    refuse(r"^input empty\.parquet is empty: leave it out", put("empty.parquet", b""))
    refuse("^cannot read input a.jsonl/b: .*Not a directory", put("a.jsonl"), "a.jsonl/b")
    refuse("^cannot read input .*: embedded null byte", "a\0b")


def test_a_file_without_permission_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    put("secret")

    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("megatron_let.data.raw_stream.Path.open", denied)
    refuse("^cannot read input secret: Permission denied", "secret")


def test_compressed_nothing_is_empty_too() -> None:
    for nothing in (gzip.compress(b""), zstandard.compress(b""), b"\x50\x2a\x4d\x18\0\0\0\0"):
        refuse("^input nothing is empty", put("nothing", nothing))


def archive(kind: str) -> bytes:
    """Return an archive that holds one file of content."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as zipped:
            zipped.writestr("a.jsonl", CONTENT)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return buffer.getvalue()


REFUSED = {
    "a zip archive": archive("zip"),
    "a tar archive": archive("tar"),
    "compressed with bzip2": bz2.compress(CONTENT),
    "compressed with bzip2;": bz2.compress(b""),
    "compressed with xz": lzma.compress(CONTENT),
    "compressed with lz4": b"\x04\x22\x4d\x18rest",
    "a 7z archive": b"7z\xbc\xaf\x27\x1crest",
    "an Arrow file": b"ARROW1\0\0rest",
    "an encrypted parquet file": b"PARErest",
    "a Git LFS pointer and not the data": b"version https://git-lfs.github.com/spec/v1\noid",
    "text in UTF-16": "{}\n".encode("utf-16"),
    "text in UTF-16;": b"\xfe\xff" + "{}\n".encode("utf-16-be"),
    "text in UTF-32": "{}\n".encode("utf-32"),
    "text in UTF-32;": b"\0\0\xfe\xff" + "{}\n".encode("utf-32-be"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_format_that_cannot_be_read_is_named(
    what: str, compress: Callable[[bytes], bytes], name: str
) -> None:
    refuse(f"^input {name} is {what.rstrip(';')}; JSON lines", put(name, compress(REFUSED[what])))


def test_compression_in_compression_is_refused() -> None:
    refuse("is compressed twice; .+: decompress it once", put("a", gzip.compress(gzip.compress(CONTENT))))
    refuse("is compressed twice", put("a", zstandard.compress(zstandard.compress(CONTENT))))
    refuse("is a parquet file; .+ not compressed", put("a", gzip.compress(b"PAR1")))


def test_a_text_may_begin_like_the_name_of_a_format() -> None:
    for number, beginning in enumerate((b"BZh said so", b"PKK", b"\xef\xbb\xbf{}", b"P", b"\x1f")):
        find_sources([put(f"{number}.txt", beginning)], RULES)


def test_damage_at_the_beginning_is_found_before_any_work() -> None:
    refuse("^input a is cut off or damaged near byte 10", put("a", gzip.compress(CONTENT)[:10]))


def test_zstd_without_its_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_let.data.decompression.has_zstandard", lambda: False)
    refuse("^input a is compressed with zstd: install the package", put("a", zstandard.compress(CONTENT)))


def test_a_file_must_be_what_it_is_said_to_be() -> None:
    put("a.jsonl")
    put("a.parquet", b"PAR")
    put("b.parquet", b"PAR1")
    refuse("^input a.jsonl is not a parquet file: it does not", "a.jsonl", rules=InputRules("parquet"))
    refuse("^input a.parquet is not a parquet file", "a.parquet")
    for other in ("jsonl", "text"):
        refuse(f"^input b.parquet is a parquet file and not {other}", "b.parquet", rules=InputRules(other))


def test_one_file_under_several_paths_is_an_error() -> None:
    Path("d").mkdir()
    put("d/a.jsonl")
    os.symlink("a.jsonl", "d/soft")
    os.link("d/a.jsonl", "d/hard")
    refuse("^input d/a.jsonl is given twice: its documents would be counted twice", "d/a.jsonl", "d/a.jsonl")
    refuse("^input d/a.jsonl is given twice", "d", "d/a.jsonl")
    refuse("^input d/soft is the same file as d/a.jsonl", "d", "d/soft")
    refuse("^input d/soft is the same file as d/a.jsonl", "d/a.jsonl", "d/soft")
    refuse("^input d/hard is the same file as d/a.jsonl", "d/*.jsonl", "d/hard")
    refuse("^input ./d/a.jsonl is the same file as d/a.jsonl", "d/a.jsonl", "./d/a.jsonl")


def test_what_a_directory_or_glob_holds_empty_or_twice_is_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("d", "e"):
        Path(name).mkdir()
        put(f"{name}/empty.jsonl", b"")
        put(f"{name}/empty.jsonl.gz", gzip.compress(b""))
    for number in range(3):
        put(f"d/{number}.jsonl")
    put("d/3.jsonl", CONTENT * 2)
    os.symlink("0.jsonl", "d/link.jsonl")
    for given in ("d", "d/*"):
        caplog.clear()
        found = find_inputs([given], RULES)
        assert [source.path for source in found.sources] == ["d/0.jsonl", "d/3.jsonl"]
        assert sorted((file.path, file.reason) for file in found.unread) == [
            ("d/1.jsonl", "same_content"),
            ("d/2.jsonl", "same_content"),
            ("d/empty.jsonl", "empty"),
            ("d/empty.jsonl.gz", "empty"),
            ("d/link.jsonl", "same_file"),
        ]
        assert caplog.messages == [
            "5 files of the input are not read: 2 empty (d/empty.jsonl), 2 same_content (d/1.jsonl), 1 same_file (d/link.jsonl)"
        ]
    refuse("^input d/empty.jsonl is empty: leave it out", "d/0.jsonl", "d/empty.jsonl")
    refuse("^inputs d/1.jsonl and d/0.jsonl have the same content", "d/[1].jsonl", "d/0.jsonl")
    refuse("^--input e: all files are empty", "e")


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("a JSON array", b'[{"text": "a"}, {"text": "b"}]'),
        ("a JSON array", b'\xef\xbb\xbf[\n  {"text": "a"}\n]\n'),
        ("JSON over several lines", b'{\n    "text": "a"\n}\n'),
        ("JSON over several lines", b'{\r\n\t"text": [\r\n\t\t"a"]}'),
        ("a table in CSV", b'text,meta\n"a",1\n'),
        ("a table in CSV", b'"id"\t"my text"\r\n1\ta\r\n'),
        ("XML or HTML", b"<!DOCTYPE html>\n<html>404</html>"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_text_in_place_of_json_lines_is_named(
    monkeypatch: pytest.MonkeyPatch, what: str, content: bytes, compress: Callable[[bytes], bytes]
) -> None:
    message = f"^input (a|standard input) is {what}, and JSON lines are needed, one object a line"
    refuse(message, put("a", compress(content)))
    with piped_standard_input(monkeypatch, compress(content)):
        if compress is bytes:
            refuse(message, "-")
        else:
            (source,) = find_sources(["-"], RULES)
            with pytest.raises(ConfigError, match=message):
                next(read_blocks(source, RULES))
    find_sources([put("a.txt", compress(content))], RULES)


def test_damaged_json_lines_are_left_to_the_count() -> None:
    for number, beginning in enumerate(
        (
            b'{"text": "a", \n{}\n',
            b"[1, 2]\n",
            b"{broken\n",
            b'\n\n{"text": "a"}',
            b"a, b\n{}\n",
            b"{\n{}\n",
            b"a\nb\n",
        )
    ):
        find_sources([put(f"{number}.jsonl", beginning)], RULES)


@pytest.mark.parametrize("size", [10, 1_500_000, 3_000_000])
def test_two_files_of_the_same_content_are_an_error(size: int) -> None:
    content = bytearray(b"x" * size)
    put("a", bytes(content))
    put("b", bytes(content))
    refuse("^inputs a and b have the same content: their documents would be counted twice", "a", "b")
    for place in (0, size // 2, size - 1):
        content[place] ^= 1
        put("b", bytes(content))
        content[place] ^= 1
        assert len(find_sources(["a", "b"], RULES)) == 2
    put("b", bytes(content) + b"x")
    assert len(find_sources(["a", "b"], RULES)) == 2


def test_files_of_different_sizes_are_not_read_for_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_let.data.sources._edge_digest", lambda source: pytest.fail("it was read"))
    assert len(find_sources([put("a"), put("b", CONTENT * 2)], RULES)) == 2


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_standard_input_is_looked_at_and_nothing_taken(
    monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    disk = compress(CONTENT * 500)
    with piped_standard_input(monkeypatch, disk):
        (source,) = find_sources(["-"], RULES)
        assert source == FoundSource("-", None, 0, RecordKind.JSON_LINES, is_parquet=False)
        assert sys.stdin.buffer.read() == disk


def test_standard_input_can_be_text_beside_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with piped_standard_input(monkeypatch, CONTENT):
        sources = find_sources([put("a"), "-"], InputRules("text"))
    assert [(source.name, source.kind) for source in sources] == [
        ("a", RecordKind.TEXT_FILE),
        ("standard input", RecordKind.TEXT_FILE),
    ]


@pytest.mark.parametrize(
    ("content", "rules", "message"),
    [
        (b"", RULES, "^input standard input is empty"),
        (CONTENT, InputRules("parquet"), "^input - cannot be parquet: .+ name the file"),
        (b"PAR1", RULES, "^input standard input is a parquet file; .+ not through a pipe"),
        (archive("zip"), RULES, "^input standard input is a zip archive"),
    ],
)
def test_standard_input_that_cannot_be_read_is_an_error(
    monkeypatch: pytest.MonkeyPatch, content: bytes, rules: InputRules, message: str
) -> None:
    with piped_standard_input(monkeypatch, content):
        refuse(message, "-", rules=rules)


def test_a_terminal_or_no_standard_input_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    with open(terminal, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        refuse("^input - is a terminal: pipe data into standard input", "-")
    os.close(controller)
    monkeypatch.setattr(sys, "stdin", None)
    refuse("^input -: standard input is closed", "-")
