"""The data programs as a user runs them: a small chain from source files to tokens, and one line for a mistake."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.stopped_runs import digests as digests_but_for_the_run
from tests.processes import HANG_SECONDS

TOOLS = Path(__file__).resolve().parents[2] / "tools"

Main = Callable[[Sequence[str]], int]


def load(name: str) -> ModuleType:
    """Import a program by its path: tools/ is no package."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> int:
    status: int = load(name).main([str(argument) for argument in arguments])
    return status


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory like a small standard library."""
    root = tmp_path_factory.mktemp("lib")
    for number in range(40):
        path = root / ("package" if number % 2 else "") / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'"""Module {number}: ünïcode."""\n\ndef function_{number}(value):\n    return value + {number}\n'
        )
    (root / "empty.py").write_text("\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "package" / "copy.py").write_bytes((root / "module_0.py").read_bytes())
    (root / "notes.txt").write_text("not a source file")
    for hidden in ("site-packages", "__pycache__"):
        (root / hidden).mkdir()
        (root / hidden / "other.py").write_text("other = 1\n")
    return root


@pytest.fixture(scope="module")
def corpus(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the corpus made from `source_tree`."""
    directory = tmp_path_factory.mktemp("corpus")
    build = ("--source-dir", source_tree, "--output-dir", directory, "--validation-fraction", 0.25)
    assert run("build_stdlib_corpus", *build) == 0
    return directory


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer directory trained on the corpus."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train = ("--input", corpus / "train.jsonl", "--vocab-size", 300, "--output-dir", directory)
    assert run("train_tokenizer", *train) == 0
    return directory


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_corpus_has_the_piles_form_and_every_usable_file_once(source_tree: Path, corpus: Path) -> None:
    train, valid = records(corpus / "train.jsonl"), records(corpus / "valid.jsonl")
    assert len(train) + len(valid) == 40
    assert len(valid) > 0
    texts = {record["text"] for record in train + valid}
    assert texts == {path.read_text() for path in source_tree.rglob("module_*.py")}
    assert [set(record) for record in train] == [{"text", "meta"}] * len(train)
    subsets = [record["meta"]["pile_set_name"] for record in train + valid]  # type: ignore[index]
    assert sorted(subsets) == ["modules"] * 20 + ["package"] * 20


def test_the_corpus_counts_what_it_leaves_out(
    source_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ("--source-dir", source_tree, "--output-dir", tmp_path, "--validation-fraction", 0.25)
    assert run("build_stdlib_corpus", *build) == 0
    assert "left out: 1 not UTF-8, 1 empty, 1 copies" in capsys.readouterr().out


def test_the_corpus_is_the_same_every_time_and_a_files_side_depends_on_its_path_alone(
    source_tree: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source_tree, copy)
    build = ("--output-dir", tmp_path / "again", "--validation-fraction", 0.25, "--source-dir", copy)
    assert run("build_stdlib_corpus", *build) == 0
    assert digests(tmp_path / "again") == digests(corpus)
    (copy / "module_0.py").unlink()
    assert run("build_stdlib_corpus", *build) == 0
    before, after = records(corpus / "valid.jsonl"), records(tmp_path / "again" / "valid.jsonl")
    assert [record for record in after if record not in before] in ([], [records_of_module_zero(source_tree)])


def records_of_module_zero(source_tree: Path) -> dict[str, object]:
    # Its copy in the package was left out before and takes its place now, on the side that its own path gives.
    return {"text": (source_tree / "module_0.py").read_text(), "meta": {"pile_set_name": "package"}}


def test_the_corpus_without_usable_files_is_an_error_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    assert run("build_stdlib_corpus", "--source-dir", tmp_path / "src", "--output-dir", tmp_path / "out") == 2
    assert "0 training and 0 validation files" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert (
        run("build_stdlib_corpus", "--source-dir", tmp_path / "absent", "--output-dir", tmp_path / "out") == 2
    )
    assert "no directory" in capsys.readouterr().err


def test_the_tokenizer_opens_with_transformers_and_encodes_any_text(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(str(tokenizer))
    assert len(opened) == 300
    assert (opened.eos_token, opened.eos_token_id, opened.bos_token) == ("<|endoftext|>", 0, "<|endoftext|>")
    text = "def function_1(x): 日本語 🤖 \x00\x7f\n"
    assert opened.decode(opened.encode(text)) == text


def test_the_tokenizer_is_the_same_every_time(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    script = TOOLS / "train_tokenizer.py"
    train = [
        str(script),
        "--input",
        str(corpus / "train.jsonl"),
        "--vocab-size",
        "300",
        "--output-dir",
        str(tmp_path),
    ]
    subprocess.run([sys.executable, *train], check=True, timeout=HANG_SECONDS, capture_output=True)
    assert digests(tmp_path) == digests(tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vocab-size", 256), "--vocab-size 256 is too small"),
        (("--vocab-size", 300, "--json-key", "txt"), 'no text under the key "txt"'),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_one_line(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    train = ("--input", corpus / "train.jsonl", "--output-dir", tmp_path / "out", *arguments)
    assert run("train_tokenizer", *train) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_from_corpus_to_tokens_and_back(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod")
    megatron = ("--workers", 1, "--partitions", 1, "--log-interval", 5, "--dataset-impl", "mmap")
    inputs = ("--input", corpus / "train.jsonl", corpus / "valid.jsonl")
    assert run("preprocess_data", *inputs, "--output-prefix", tmp_path / "out", *flags, *megatron) == 0
    printed = capsys.readouterr()
    assert "40 documents" in printed.out
    assert "nothing skipped" in printed.out
    assert "ETA 0:00:00" in printed.err
    assert run("inspect_data", tmp_path / "out_text_document", "--verify") == 0
    assert "checksums: ok, SHA-256" in capsys.readouterr().out
    assert run("inspect_data", tmp_path / "out_text_document", "--document", 0) == 0
    shown = capsys.readouterr().out
    first = str(records(corpus / "train.jsonl")[0]["text"])
    assert first + "<|endoftext|>" in shown
    assert "40 documents" in shown


def test_preprocessing_as_a_program_with_two_workers_gives_the_same_files(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    flags = ["--input", str(corpus / "train.jsonl"), "--append-eod"]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    assert run("preprocess_data", *flags, "--output-prefix", tmp_path / "one" / "out") == 0
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), *flags, "--workers", "2"]
    command += ["--output-prefix", str(tmp_path / "two" / "out")]
    subprocess.run(command, check=True, timeout=HANG_SECONDS, capture_output=True, cwd=tmp_path)
    expected = digests_but_for_the_run(tmp_path / "one")
    assert digests_but_for_the_run(tmp_path / "two") == expected
    assert len(expected) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--input": "absent.jsonl"}, "absent.jsonl does not exist"),
        ({"--tokenizer-model": "absent"}, "tokenizer absent is neither a directory"),
        ({"--tokenizer-type": "BertWordPieceCase"}, "invalid choice: 'BertWordPieceCase'"),
        ({"--json-keys": "txt"}, 'under the key "txt"'),
        ({"--workers": "0"}, "--workers 0"),
        ({"--vocab-file": "a"}, "--vocab-file has no effect with HuggingFaceTokenizer"),
        (
            {"--vocab-size": "9", "--merge-file": "a"},
            "--merge-file and --vocab-size have no effect with Hugg",
        ),
        ({"--tokenizer-type": "NullTokenizer"}, "--tokenizer-model has no effect with NullTokenizer"),
        ({"--tokenizer-type": "GPT2BPETokenizer"}, "--tokenizer-model has no effect with GPT2BPETokenizer"),
        (
            {
                "--tokenizer-type": "NullTokenizer",
                "--tokenizer-model": "",
                "--vocab-size": "9",
                "--encode-special-tokens": "",
            },
            "--encode-special-tokens has no effect with NullTokenizer",
        ),
        (
            {"--text-documents": "file", "--input-format": "jsonl"},
            "--text-documents has no effect with --input-format jsonl",
        ),
        ({"--text-documents": "line", "--input-format": "parquet"}, "--text-documents has no effect"),
        ({"--commit-interval": "nan"}, "--commit-interval: nan: give a number of seconds from 0 on"),
        ({"--commit-interval": "-1"}, "--commit-interval: -1: give a number of seconds from 0 on"),
        ({"--commit-interval": "inf"}, "--commit-interval: inf: give a number of seconds from 0 on"),
        ({"--commit-interval": "soon"}, "invalid seconds value: 'soon'"),
        ({"--split-sentence": ""}, "unrecognized arguments: --split-sentence"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    message: str,
) -> None:
    flags = {
        "--input": str(corpus / "train.jsonl"),
        "--output-prefix": str(tmp_path / "out"),
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": str(tokenizer),
        **changes,
    }
    arguments = [
        part for pair in flags.items() for part in pair if part and pair != ("--tokenizer-model", "")
    ]
    assert run("preprocess_data", *arguments) == 2
    said = capsys.readouterr().err.splitlines()
    error_lines = [line for line in said if not line.startswith(("processed", "encoder: "))]
    assert len(error_lines) == 1
    assert message in error_lines[0]
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_is_one_line_and_leaves_nothing(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_let.data.indexed_writer.IndexedWriter.add_documents", interrupt)
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)
    output = ("--input", corpus / "train.jsonl", "--output-prefix", tmp_path / "out")
    assert run("preprocess_data", *flags, *output) == 130
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("encoder: "))
    assert line == "error: interrupted; the same command begins anew"
    assert list(tmp_path.iterdir()) == []


def test_inspecting_a_damaged_or_absent_pair_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect_data", tmp_path / "absent") == 2
    captured = capsys.readouterr().err
    assert "no absent.idx" in captured
    assert captured.count("\n") == 1
