"""How the data programs end: whatever happens is one line and a status, in each of them alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_let.data.journal import Journal, WorkingDirectory
from tests.data.foreign import write_with_core
from tests.processes import HANG_SECONDS
from tests.tools.test_data_tools import TOOLS, run
from tests.training.bad_input import write_word_tokenizer

PROGRAMS = ("preprocess_data", "merge_data", "inspect_data", "build_data_cache", "train_tokenizer")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return the prefix of a pair without manifest."""
    write_with_core(tmp_path / "pair", [[[1, 2, 4]], [[3, 4]]], "uint16")
    return tmp_path / "pair"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Return the directory of a tokenizer of five words."""
    write_word_tokenizer(tmp_path / "tokenizer", ["zero", "one", "two", "three", "<eod>"])
    return tmp_path / "tokenizer"


def interrupt(*arguments: object) -> Iterator[str]:
    raise KeyboardInterrupt


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that was said on stderr."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    return said[len("error: ") : -1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_command_line_is_one_line_and_status_two(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # build_data_cache passes on what it does not know: there it is training that refuses the flag.
    wrong = ("--world-size", "x") if program == "build_data_cache" else ("--no-such-flag",)
    assert run(program, *wrong) == 2
    assert "(--help lists the flags)" in error_of(capsys)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_printed_and_no_error(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(program, "--help")
    assert stopped.value.code == 0
    assert f"python tools/{program}.py" in capsys.readouterr().out


def test_help_tells_of_texts_too_long_to_encode(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("preprocess_data", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "one of more than 2 MiB (8 MiB with SentencePiece) is skipped too (reason too_long_to_encode)"
        in shown
    )


@pytest.mark.parametrize("words", [(), ("--verify",), ("--help",)])
def test_output_that_nobody_reads_is_no_traceback(prefix: Path, words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(TOOLS / "inspect_data.py"), str(prefix), *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=HANG_SECONDS)
    os.close(writing)
    assert done.stderr == ""
    # argparse itself passes over what it cannot write, where output is not buffered.
    assert done.returncode in ((0, 141) if words == ("--help",) else (141,))


def test_errors_that_nobody_reads_keep_their_status(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(TOOLS / "inspect_data.py"), str(tmp_path / "absent")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, text=True, timeout=HANG_SECONDS)
    os.close(writing)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_manifest_that_cannot_be_written_is_one_line(
    prefix: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(f"{prefix}.manifest.json.partial")
    place.mkdir()
    assert run("inspect_data", prefix, "--add-manifest", "--tokenizer-model", tokenizer) == 2
    assert error_of(capsys) == f"{place}: Is a directory"


def test_an_interrupted_look_or_merge_is_one_line(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.data.index_tables.IndexTables.document_ends", interrupt)
    assert run("inspect_data", prefix) == 130
    assert error_of(capsys) == "interrupted"
    monkeypatch.setattr("megatron_let.data.indexed_writer.IndexedWriter.add_tokens", interrupt)
    before = sorted(tmp_path.iterdir())
    assert run("merge_data", "--input", prefix, "--output-prefix", tmp_path / "out") == 130
    assert error_of(capsys) == "interrupted"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("is_kept", [True, False])
def test_an_interrupted_run_promises_to_go_on_only_from_a_journal(
    is_kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(prefix: str) -> None:
        with WorkingDirectory(prefix) as directory:
            if is_kept:
                directory.write_journal(Journal({}, {}))
            raise KeyboardInterrupt

    monkeypatch.setattr(
        "megatron_let.data.preprocess.preprocess", lambda settings, *others: work(settings.output_prefix)
    )
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", 9)
    assert run("preprocess_data", "--input", "a", "--output-prefix", tmp_path / "out", *null) == 130
    promise = "goes on where this one stopped" if is_kept else "begins anew"
    assert error_of(capsys) == f"interrupted; the same command {promise}"


def test_a_name_that_is_not_utf8_is_shown_or_refused(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/p\xff"
    write_with_core(Path(os.fsdecode(name)), [[[1, 2]]], "uint16")
    command: list[str | bytes] = [sys.executable, str(TOOLS / "inspect_data.py"), name]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    shown = subprocess.run(command, capture_output=True, timeout=HANG_SECONDS, check=True, env=strict)
    assert b"p\\udcff: 1 documents" in shown.stdout
    null = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "9")
    own: dict[str, tuple[str | bytes, ...]] = {"merge_data": (), "preprocess_data": null}
    for program, flags in own.items():
        command = [
            sys.executable,
            str(TOOLS / f"{program}.py"),
            "--input",
            name,
            *flags,
            "--output-prefix",
            name,
        ]
        refused = subprocess.run(command, capture_output=True, timeout=HANG_SECONDS)
        assert refused.returncode == 2
        assert refused.stderr.count(b"\n") == 1
        assert b"is not UTF-8: give another name" in refused.stderr
