"""`inspect_data.py` as a user runs it: counts, checks with their exit status, and manifests for foreign files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import inspect_data
import numpy as np
import pytest

from megatron_let.data.indexed import check_indexed
from megatron_let.data.manifest import SubsetCount, read_manifest, write_manifest
from tests.data.foreign import edit_index, write_as_neox, write_with_core
from tests.processes import HANG_SECONDS
from tests.training.bad_input import write_word_tokenizer

WORDS = ["zero", "one", "two", "three", "<eod>"]
DOCUMENTS = [[[1, 2, 4]], [[3, 4]], [], [[0, 0, 4]]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Return the directory of a tokenizer of five words."""
    write_word_tokenizer(tmp_path / "tokenizer", WORDS)
    return tmp_path / "tokenizer"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return the prefix of a pair without manifest."""
    write_with_core(tmp_path / "pair", DOCUMENTS, "uint16")
    return tmp_path / "pair"


def run(*words: object) -> int:
    return inspect_data.main([str(word) for word in words])


def test_counts_lengths_and_what_the_manifest_tells(
    prefix: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prefix) == 0
    shown = capsys.readouterr().out
    assert f"{prefix}: 4 documents, 3 sequences, 8 tokens, 2.0 tokens a document, uint16" in shown
    assert "min 0, median 2, p90 3, p99 3, max 3; 1 documents are empty" in shown
    assert "  2-3 |########" in shown
    assert "no manifest" in shown
    assert run(prefix, "--add-manifest", "--tokenizer-model", tokenizer) == 0
    manifest = read_manifest(str(prefix))
    assert manifest is not None
    subsets = {"Pile-CC": SubsetCount(2, 5, 1200), "": SubsetCount(2, 3, 9)}
    write_manifest(str(prefix), replace(manifest, skipped={"blank_line": 2, "no_text": 3}, subsets=subsets))
    capsys.readouterr()
    assert run(prefix) == 0
    shown = capsys.readouterr().out
    assert f"tokenizer: HuggingFaceTokenizer {tokenizer}, 5 ids, eod 4 appended" in shown
    assert "records skipped: 5\n  blank_line: 2\n  no_text: 3\n" in shown
    assert (
        "subsets:\n  (none): 2 documents, 3 tokens, 9 bytes of text\n  Pile-CC: 2 documents, 5 tokens, 1,200"
        in shown
    )


def test_a_document_is_decoded_and_one_that_is_not_there_refused(
    prefix: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prefix, "--document", 1, "--tokenizer-model", tokenizer) == 0
    assert "document 1: 2 tokens: 3 4\nthree <eod>\n" in capsys.readouterr().out
    for absent in (4, -1):
        assert run(prefix, "--document", absent, "--tokenizer-model", tokenizer) == 2
        assert capsys.readouterr().err == f"error: {prefix} has documents 0 to 3, not {absent}\n"
    assert run(prefix, "--document", 1) == 2
    assert "needs --tokenizer-model" in capsys.readouterr().err
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 4)
    assert run(prefix, "--document", 1, *null) == 0
    assert "\n3 4\n" in capsys.readouterr().out


def test_a_tokenizer_of_two_files_is_asked_for_by_its_own_flags(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {"0": 0, "1": 1, "2": 2, "3": 3, "<|endoftext|>": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = ("--vocab-file", tmp_path / "vocab.json", "--merge-file", tmp_path / "merges.txt")
    given = ("--tokenizer-type", "GPT2BPETokenizer", *files)
    assert run(prefix, "--add-manifest", *given) == 0
    capsys.readouterr()
    assert run(prefix, "--document", 1) == 2
    said = capsys.readouterr().err
    assert "needs --tokenizer-type GPT2BPETokenizer --vocab-file and --merge-file" in said
    assert "--tokenizer-model" not in said
    assert run(prefix, "--document", 1, *given) == 0
    assert "\n3<|endoftext|>\n" in capsys.readouterr().out


def test_verify_prints_a_line_a_check_and_ends_with_its_status(
    prefix: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prefix, "--add-manifest", "--tokenizer-model", tokenizer) == 0
    assert "largest id 4 of 5" in capsys.readouterr().out
    assert run(prefix, "--verify") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(": ok" in line for line in lines)
    edit_index(prefix, 34 + 4 * 3 + 8, "<q", 8)
    assert run(prefix, "--verify") == 2
    captured = capsys.readouterr()
    assert "\npointers: FAILED: sequence 1 begins at byte 8" in captured.out
    assert captured.err == f"error: {prefix} failed 2 of 8 checks: pointers, checksums\n"


def test_verify_with_another_tokenizer_than_the_datas(
    prefix: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prefix, "--add-manifest", "--tokenizer-model", tokenizer) == 0
    assert run(prefix, "--verify", "--tokenizer-model", tokenizer) == 0
    write_word_tokenizer(tmp_path / "swapped", [WORDS[1], WORDS[0], *WORDS[2:]])
    assert run(prefix, "--verify", "--tokenizer-model", tmp_path / "swapped") == 2
    assert "tokenizer: FAILED: the data were made with" in capsys.readouterr().out


def test_a_manifest_for_files_of_neox_is_what_training_reads(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_as_neox(tmp_path / "neox", DOCUMENTS, "uint16")
    assert run(tmp_path / "neox", "--add-manifest", "--tokenizer-model", tokenizer) == 0
    assert "every document ends in eod (4)" in capsys.readouterr().out
    manifest = read_manifest(str(tmp_path / "neox"))
    assert manifest is not None
    assert manifest.tokens == check_indexed(str(tmp_path / "neox")).tokens
    assert run(tmp_path / "neox", "--add-manifest", "--tokenizer-model", tokenizer) == 2
    assert "is there already" in capsys.readouterr().err
    write_as_neox(tmp_path / "other", [[[1, 5]]], "uint16")
    assert run(tmp_path / "other", "--add-manifest", "--tokenizer-model", tokenizer) == 2
    message = capsys.readouterr().err
    assert "id 5 at document 0 (sequence 0, token 1), allowed are 0 to 4" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--verify", "--add-manifest"), "not allowed with argument"),
        (("--add-manifest",), "needs --tokenizer-model"),
        (("--document", "one"), "invalid int value"),
        (("--document", "0", "--vocab-size", "5"), "--vocab-size: give --tokenizer-type too"),
        (("--verify", "--vocab-file", "a", "--merge-file", "b"), "--vocab-file and --merge-file: give"),
        (
            ("--verify", "--tokenizer-model", "a", "--vocab-size", "5"),
            "--vocab-size has no effect with HuggingFaceTokenizer",
        ),
        (("--tokenizer-model", "a"), "--tokenizer-model has no effect without --document, --verify or"),
        (("--tokenizer-type", "NullTokenizer"), "--tokenizer-type has no effect without --document"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    words: tuple[str, ...], message: str, prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prefix, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_large_table_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    # 20 million sequences of one byte: 400 MB of tables, in a program of its own to see its peak.
    count = 20_000_000
    with (tmp_path / "large.idx").open("wb") as stream:
        stream.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 1, count, count + 1))
        stream.write(np.ones(count, np.int32).tobytes())
        stream.write(np.arange(count, dtype=np.int64).tobytes())
        stream.write(np.arange(count + 1, dtype=np.int64).tobytes())
    (tmp_path / "large.bin").write_bytes(bytes(count))
    code = (
        "import inspect_data\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "base = peak()\n"
        f"assert inspect_data.main([{str(tmp_path / 'large')!r}, '--verify']) == 0\n"
        f"assert inspect_data.main([{str(tmp_path / 'large')!r}]) == 0\n"
        "print('grew', peak() - base)"
    )
    tools = Path(inspect_data.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tools,
        check=True,
        timeout=HANG_SECONDS,
    )
    assert int(done.stdout.split("grew")[1]) < 120_000  # KiB; the largest table has 156,000
