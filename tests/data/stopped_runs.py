"""Runs that are stopped: what they read, how they are stopped, and what they leave, for the tests of going on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_let.data.outputs import Outputs
from megatron_let.data.preprocess import PreprocessSettings, preprocess
from megatron_let.data.tokenizers import NullTokenizer

TOKENIZER = NullTokenizer(60000)
SUBSETS = ("Pile-CC", "Wikipedia (en)", "GitHub")
BAD = (b"{broken", b"", b'{"text": null}', b'{"text": "\xff"}')


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


def settings_for(prefix: Path, inputs: list[str], **changes: Any) -> PreprocessSettings:
    values: dict[str, Any] = {
        **{"append_eod": True, "max_error_fraction": 1.0, "block_bytes": 4096, "commit_seconds": 0.0},
        **changes,
    }
    return PreprocessSettings(tuple(inputs), str(prefix), **values)


def digests(directory: Path) -> dict[str, str]:
    """Return the digests of everything in a directory, the manifests' paths and what they say of the run made the same."""
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            content = path.read_bytes().replace(str(directory).encode(), b"HERE")
            if path.name.endswith(".manifest.json"):
                content = json.dumps({**json.loads(content), "made": {}}).encode()
            found[str(path.relative_to(directory))] = hashlib.sha256(content).hexdigest()
    return found


def whole_run(prefix: Path, inputs: list[str], **changes: Any) -> dict[str, str]:
    prefix.parent.mkdir()
    preprocess(settings_for(prefix, inputs, **changes), TOKENIZER, lambda line: None)
    return digests(prefix.parent)


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
