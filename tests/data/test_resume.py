"""A run killed at any moment goes on to the same bytes; other arguments or input are refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_let.data import continuing
from megatron_let.data.continuing import arguments_of
from megatron_let.data.manifest import Manifest, write_manifest
from megatron_let.data.outputs import Outputs
from megatron_let.data.preprocess import PreprocessSettings, preprocess
from megatron_let.data.tokenizers import NullTokenizer
from megatron_let.errors import ConfigError
from tests.data.standard_input import piped_standard_input

PROGRAM = Path(__file__).with_name("preprocess_program.py")
TOKENIZER = NullTokenizer(60000)
SUBSETS = ("Pile-CC", "Wikipedia (en)", "GitHub")
BAD = (b"{broken", b"", b'{"text": null}', b'{"text": "\xff"}')
KILLS = 30


class Stopped(Exception):
    """Stands for a kill inside this process."""


def lines(count: int) -> list[bytes]:
    """Return records of three subsets, some of them unusable."""
    choose = random.Random(3)
    made: list[bytes] = []
    for number in range(count):
        if number % 17 == 5:
            made.append(BAD[number % len(BAD)])
        ids = " ".join(str(choose.randrange(60000)) for _ in range(choose.randint(1, 60)))
        record: dict[str, Any] = {"text": ids, "title": str(number)}
        if number % 7:
            record["meta"] = {"pile_set_name": choose.choice(SUBSETS)}
        made.append(json.dumps(record).encode())
    return made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return three files: plain, gzip, zstd."""
    directory = tmp_path_factory.mktemp("inputs")
    content = [b"\n".join(lines(count)) + b"\n" for count in (900, 700, 800)]
    (directory / "a.jsonl").write_bytes(content[0])
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(content[1]))
    (directory / "c.jsonl.zst").write_bytes(zstandard.compress(content[2]))
    return sorted(str(path) for path in directory.iterdir())


def settings_for(prefix: Path, inputs: list[str], **changes: Any) -> PreprocessSettings:
    values: dict[str, Any] = {
        **{"append_eod": True, "max_error_fraction": 1.0, "block_bytes": 4096, "commit_seconds": 0.0},
        **changes,
    }
    return PreprocessSettings(tuple(inputs), str(prefix), **values)


def digests(directory: Path) -> dict[str, str]:
    """Return the digests of everything in a directory, the manifests' paths made the same."""
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            content = path.read_bytes().replace(str(directory).encode(), b"HERE")
            found[str(path.relative_to(directory))] = hashlib.sha256(content).hexdigest()
    return found


def whole_run(prefix: Path, inputs: list[str], **changes: Any) -> dict[str, str]:
    prefix.parent.mkdir()
    preprocess(settings_for(prefix, inputs, **changes), TOKENIZER, lambda line: None)
    return digests(prefix.parent)


def start(settings: PreprocessSettings) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), json.dumps(asdict(settings))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"workers": 2, "split_by_subset": True, "json_keys": ("text", "title")}],
    ids=["one", "split"],
)
def test_killed_at_random_moments_a_run_goes_on_to_the_same_bytes(
    inputs: list[str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Half of the kills on each layout; a run that comes through is taken away, and the next begins anew."""
    expected = whole_run(tmp_path / "whole" / "out", inputs, **changes)
    (tmp_path / "killed").mkdir()
    settings = settings_for(tmp_path / "killed" / "out", inputs, **changes)
    choose = random.Random(len(changes))
    num_killed = num_resumed = num_finished = 0
    while num_killed < KILLS // 2 or not num_finished:
        run = start(settings)
        if num_killed < KILLS // 2:
            num_resumed += wait_into(run, tmp_path / "killed" / "out.partial", is_writing=num_killed % 2 == 1)
            time.sleep(choose.uniform(0.0, 0.25))
            run.send_signal(signal.SIGKILL)
        output = run.communicate(timeout=60)[0]
        num_killed += run.returncode == -signal.SIGKILL
        if run.returncode == 0:
            num_finished += 1
            assert digests(tmp_path / "killed") == expected
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
        else:
            assert run.returncode == -signal.SIGKILL, output
    assert num_resumed > 0


def wait_into(run: subprocess.Popen[str], directory: Path, *, is_writing: bool) -> bool:
    """Wait until the run works, or has noted something in its journal; return whether it goes on from an earlier one.

    What is interrupted then is the work, not the imports.
    """
    assert run.stdout is not None
    first, before = run.stdout.readline(), journal_of(directory)
    while is_writing and run.poll() is None and journal_of(directory) in (None, before):
        time.sleep(0.002)
    return first.startswith("going on after")


def journal_of(directory: Path) -> bytes | None:
    try:
        return (directory / "journal.json").read_bytes()
    except FileNotFoundError:
        return None


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let a run in this process stop when it is about to write block `count`; return what undoes that."""
    original, seen = Outputs.add, [0]

    def add(self: Outputs, *arguments: Any) -> None:
        seen[0] += 1
        if seen[0] > count:
            raise Stopped
        original(self, *arguments)

    monkeypatch.setattr(Outputs, "add", add)
    return lambda: monkeypatch.setattr(Outputs, "add", original)


def stopped_run(settings: PreprocessSettings, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    undo = stop_after(count, monkeypatch)
    with pytest.raises(Stopped):
        preprocess(settings, TOKENIZER, lambda line: None)
    undo()


def test_from_every_single_chunk_a_run_goes_on_to_the_same_bytes(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each block in turn, and started again every time: each entry of the journal is taken up once."""
    expected = whole_run(tmp_path / "whole" / "out", inputs)
    (tmp_path / "stopped").mkdir()
    settings = settings_for(tmp_path / "stopped" / "out", inputs)
    num_stops = 0
    undo = stop_after(1, monkeypatch)
    while True:
        try:
            preprocess(settings, TOKENIZER, lambda line: None)
            break
        except Stopped:
            num_stops += 1
            undo()
            undo = stop_after(1, monkeypatch)
    assert num_stops > 100
    assert digests(tmp_path / "stopped") == expected


def test_a_run_goes_on_with_another_number_of_workers_and_encoder(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_run(tmp_path / "whole" / "out", inputs)
    (tmp_path / "stopped").mkdir()
    prefix = tmp_path / "stopped" / "out"
    stopped_run(settings_for(prefix, inputs), 40, monkeypatch)
    said: list[str] = []
    changes = {"workers": 2, "encoder": "plain", "log_interval": 7, "on_error": "skip"}
    preprocess(settings_for(prefix, inputs, **changes), TOKENIZER, said.append)
    assert said[0].startswith("going on after 0.")
    assert digests(tmp_path / "stopped") == expected


OTHER_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "--append-eod": ({"append_eod": False}, "was True, is False"),
    "--json-keys": ({"json_keys": ("text", "title")}, r"was \['text'\], is \['text', 'title'\]"),
    "--split-by-subset": ({"split_by_subset": True}, "was False, is True"),
    "--max-document-bytes": ({"max_document_bytes": 10**6}, "was 134217728, is 1000000"),
    "--invalid-utf8": ({"invalid_utf8": "replace"}, "was skip, is replace"),
    "--input-format": ({"input_format": "jsonl"}, "was auto, is jsonl"),
    "--text-documents": ({"text_documents": "line"}, "was file, is line"),
    "--subset-key": ({"subset_key": "source"}, r"was meta\.pile_set_name, is source"),
}


@pytest.mark.parametrize("name", list(OTHER_ARGUMENTS))
def test_other_arguments_are_refused_and_restart_begins_anew(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, message = OTHER_ARGUMENTS[name]
    expected = whole_run(tmp_path / "whole" / "out", inputs, **changes)
    (tmp_path / "stopped").mkdir()
    prefix = tmp_path / "stopped" / "out"
    stopped_run(settings_for(prefix, inputs), 40, monkeypatch)
    before = digests(tmp_path / "stopped")
    with pytest.raises(ConfigError, match=rf"\({name} {message}\): give the same to go on, or --restart"):
        preprocess(settings_for(prefix, inputs, **changes), TOKENIZER, lambda line: None)
    assert digests(tmp_path / "stopped") == before
    preprocess(settings_for(prefix, inputs, **changes, restart=True), TOKENIZER, lambda line: None)
    assert digests(tmp_path / "stopped") == expected


def test_every_argument_that_decides_over_the_bytes_is_compared(tmp_path: Path) -> None:
    compared = set(arguments_of(settings_for(tmp_path / "out", ["a"]), TOKENIZER))
    assert compared == {*OTHER_ARGUMENTS, "--input", "the tokenizer", "versions"}


class OtherEnd(NullTokenizer):
    """The same ids for every text, another end of document."""

    def __init__(self) -> None:
        super().__init__(60000)
        self.eod = 7


@pytest.mark.parametrize("tokenizer", [NullTokenizer(60001), OtherEnd()])
def test_another_tokenizer_is_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: NullTokenizer
) -> None:
    stopped_run(settings_for(tmp_path / "out", inputs), 40, monkeypatch)
    with pytest.raises(ConfigError, match=r"\(the tokenizer was"):
        preprocess(settings_for(tmp_path / "out", inputs), tokenizer, lambda line: None)


@pytest.mark.parametrize("name", ["__version__", "version"])
def test_another_version_is_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stopped_run(settings_for(tmp_path / "out", inputs), 40, monkeypatch)
    monkeypatch.setattr(continuing, name, "9.9" if name == "__version__" else lambda package: "9.9")
    with pytest.raises(ConfigError, match=r"\(versions was"):
        preprocess(settings_for(tmp_path / "out", inputs), TOKENIZER, lambda line: None)


def test_a_restart_that_cannot_begin_leaves_the_stopped_run(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(settings_for(tmp_path / "out", inputs), 40, monkeypatch)
    before = digests(tmp_path / "out.partial")
    with pytest.raises(ConfigError, match="does not exist"):
        preprocess(settings_for(tmp_path / "out", ["typo.jsonl"], restart=True), TOKENIZER, lambda line: None)
    assert digests(tmp_path / "out.partial") == before


def test_other_files_in_the_same_directory_are_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "inputs"
    directory.mkdir()
    for path in inputs:
        (directory / Path(path).name).write_bytes(Path(path).read_bytes())
    stopped_run(settings_for(tmp_path / "out", [str(directory)]), 40, monkeypatch)
    (directory / "d.jsonl").write_text('{"text": "1"}\n')
    with pytest.raises(ConfigError, match=r"names other files than the stopped run \(.*d\.jsonl\)"):
        preprocess(settings_for(tmp_path / "out", [str(directory)]), TOKENIZER, lambda line: None)


@pytest.mark.parametrize("is_changed", [False, True])
@pytest.mark.parametrize("count", [20, 70])
def test_standard_input_fed_again_must_be_the_same(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, is_changed: bool
) -> None:
    """Stopped in the middle of it, and after its end."""
    expected = whole_run(tmp_path / "whole" / "out", [inputs[0], inputs[1]])
    content = Path(inputs[0]).read_bytes()
    (tmp_path / "stopped").mkdir()
    settings = settings_for(tmp_path / "stopped" / "out", ["-", inputs[1]])
    with piped_standard_input(monkeypatch, content):
        stopped_run(settings, count, monkeypatch)
    if is_changed:
        content = content.replace(b"7", b"8", 1)
        with piped_standard_input(monkeypatch, content), pytest.raises(ConfigError, match="changed since"):
            preprocess(settings, TOKENIZER, lambda line: None)
        return
    with piped_standard_input(monkeypatch, content):
        preprocess(settings, TOKENIZER, lambda line: None)
    for kind in ("bin", "idx"):
        name = f"out_text_document.{kind}"
        assert digests(tmp_path / "stopped")[name] == expected[name]


@pytest.mark.parametrize("change", ["same size", "longer", "touched", "fewer files", "other order"])
@pytest.mark.parametrize("which", ["finished", "half read"])
def test_a_changed_input_is_refused(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, which: str
) -> None:
    copies = [tmp_path / Path(path).name for path in inputs]
    for path, copy in zip(inputs, copies, strict=True):
        copy.write_bytes(Path(path).read_bytes())
    names = [str(copy) for copy in copies]
    expected = whole_run(tmp_path / "whole" / "out", names)
    (tmp_path / "run").mkdir()
    prefix = tmp_path / "run" / "out"
    # The first file has some 45 blocks: either it is read to its end, or half of it.
    stopped_run(settings_for(prefix, names), 70 if which == "finished" else 20, monkeypatch)
    content = bytearray(copies[0].read_bytes())
    if change == "same size":
        content[100] ^= 1
        copies[0].write_bytes(content)
    elif change == "longer":
        copies[0].write_bytes(content + b"{}\n")
    elif change == "touched":
        copies[0].write_bytes(content)
        os.utime(copies[0], (1, 1))
    elif change == "fewer files":
        names = names[:2]
    else:
        names = [names[1], names[0], names[2]]
    if change == "touched":
        preprocess(settings_for(prefix, names), TOKENIZER, lambda line: None)
        assert digests(tmp_path / "run") == expected
        return
    with pytest.raises(ConfigError, match=r"--input|has changed|had .* bytes") as caught:
        preprocess(settings_for(prefix, names), TOKENIZER, lambda line: None)
    assert "--restart" in str(caught.value)


def test_a_kill_while_the_pairs_are_completed_is_made_good(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_run(tmp_path / "whole" / "out", inputs, split_by_subset=True)
    (tmp_path / "stopped").mkdir()
    settings = settings_for(tmp_path / "stopped" / "out", inputs, split_by_subset=True)
    for count in range(4):
        seen = [0]

        def write(stem: str, manifest: Manifest, left: int = count, seen: list[int] = seen) -> None:
            seen[0] += 1
            if seen[0] > left:
                raise Stopped
            write_manifest(stem, manifest)

        with monkeypatch.context() as patch:
            patch.setattr("megatron_let.data.outputs.write_manifest", write)
            with pytest.raises(Stopped):
                preprocess(settings, TOKENIZER, lambda line: None)
        assert seen == [count + 1]
    preprocess(settings, TOKENIZER, lambda line: None)
    assert digests(tmp_path / "stopped") == expected


def stopping_at_rename(count: int) -> Callable[[Path, Any], Path]:
    """Return a Path.replace that stops the run after `count` renames to final names."""
    original, left = Path.replace, [count]

    def replace(self: Path, target: Any) -> Path:
        if not Path(target).parent.name.endswith(".partial"):
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
        return original(self, target)

    return replace


def test_a_kill_between_the_renames_is_made_good_without_the_input(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[str, str] = {}
    for count in [None, *range(14)]:  # four pairs with their manifests, the blend and the account
        directory = tmp_path / f"stopped_{count}"
        directory.mkdir()
        copies = [directory / Path(path).name for path in inputs]
        for path, copy in zip(inputs, copies, strict=True):
            copy.write_bytes(Path(path).read_bytes())
        settings = settings_for(directory / "out", [str(copy) for copy in copies], split_by_subset=True)
        if count is None:
            preprocess(settings, TOKENIZER, lambda line: None)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", stopping_at_rename(count))
                with pytest.raises(Stopped):
                    preprocess(settings, TOKENIZER, lambda line: None)
        for copy in copies:
            copy.unlink()
        if count is None:
            expected = digests(directory)
        else:
            preprocess(settings, TOKENIZER, lambda line: None)
            assert digests(directory) == expected
    assert len(expected) == 14


def test_finished_files_go_where_the_second_call_says_and_of_the_same_input(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working directory the prefix is another word for the same place."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    copy = tmp_path / "input.jsonl"
    copy.write_bytes(Path(inputs[0]).read_bytes())
    monkeypatch.chdir(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping_at_rename(0))
        with pytest.raises(Stopped):
            preprocess(settings_for(Path("out"), [str(copy)]), TOKENIZER, lambda line: None)
    monkeypatch.chdir(tmp_path / "y")
    again = settings_for(tmp_path / "x" / "out", [str(copy)])
    content = copy.read_bytes()
    copy.write_bytes(content.replace(b"7", b"8", 1))
    with pytest.raises(ConfigError, match="has changed since the stopped run read it"):
        preprocess(again, TOKENIZER, lambda line: None)
    copy.write_bytes(content)
    with pytest.raises(ConfigError, match="--append-eod was True, is False"):
        preprocess(
            settings_for(tmp_path / "x" / "out", [str(copy)], append_eod=False), TOKENIZER, lambda line: None
        )
    preprocess(again, TOKENIZER, lambda line: None)
    assert list((tmp_path / "y").iterdir()) == []
    assert len(list((tmp_path / "x").iterdir())) == 3


def test_an_error_leaves_what_can_be_gone_on_with(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle: the run ends with one line, and goes on when there is room."""
    expected = whole_run(tmp_path / "whole" / "out", inputs)
    (tmp_path / "full").mkdir()
    settings = settings_for(tmp_path / "full" / "out", inputs)
    original, seen = Outputs.add, [0]

    def add(self: Outputs, *arguments: Any) -> None:
        seen[0] += 1
        if seen[0] > 30:
            raise OSError(28, "No space left on device")
        original(self, *arguments)

    monkeypatch.setattr(Outputs, "add", add)
    with pytest.raises(Exception, match=r"No space left on device.*same command goes on"):
        preprocess(settings, TOKENIZER, lambda line: None)
    monkeypatch.setattr(Outputs, "add", original)
    said: list[str] = []
    preprocess(settings, TOKENIZER, said.append)
    assert said[0].startswith("going on after")
    assert digests(tmp_path / "full") == expected
