"""A run killed at any moment goes on to the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data.manifest import Manifest, write_manifest
from megatron_let.data.outputs import Outputs
from megatron_let.data.preprocess import PreprocessSettings, preprocess
from tests.data.stopped_runs import (
    TOKENIZER,
    Stopped,
    digests,
    settings_for,
    stop_after,
    stopped_run,
    stopping_at_rename,
    whole_run,
)
from tests.processes import HANG_SECONDS

PROGRAM = Path(__file__).with_name("preprocess_program.py")
KILLS = 30


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
        output = run.communicate(timeout=HANG_SECONDS)[0]
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
    (manifest,) = preprocess(settings_for(prefix, inputs, **changes), TOKENIZER, said.append).values()
    assert said[0].startswith("going on after 0.")
    assert said[-1].startswith(f"processed {manifest.records:,} records, 100.0 %")
    assert digests(tmp_path / "stopped") == expected


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
