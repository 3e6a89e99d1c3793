"""Files that anybody may have put in place of a small one: one line, no waiting, no memory; and nobody reads past that."""

from __future__ import annotations

import ast
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_let.config.command_line import read_yaml
from megatron_let.config.data_files import with_data_files
from megatron_let.data.digests import sha256_of
from megatron_let.data.hf_directory import load_auto_tokenizer
from megatron_let.data.manifest import manifest_path, read_manifest
from megatron_let.directory_lock import LOCK_FILE, lock_directory
from megatron_let.errors import ConfigError
from megatron_let.let.hf_files import read_config
from megatron_let.plain_json import read_json
from megatron_let.regular_files import open_regular, read_bytes, read_text, require_regular_files
from megatron_let.training.checkpoint_files import TRACKER, find_damage, read_tracker
from megatron_let.training.metrics import METRICS_FILE, drop_rows_past

ROOT = Path(__file__).parent.parent


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_large(path: Path) -> None:
    """Make a file that takes no room on the disk and all memory of whoever reads it."""
    with path.open("wb") as stream:
        stream.truncate(1 << 33)


PLACED: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (make_fifo, "it is a FIFO, not a regular file"),
    "device": (make_device, "it is a device, not a regular file"),
    "large": (make_large, "it is larger than"),
}


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_text(tmp_path / "link") == "one\ntwo\n"
    assert read_bytes(tmp_path / "a", limit=9) == b"one\r\ntwo\n"
    with open_regular(tmp_path / "a") as stream:
        assert stream.read() == b"one\r\ntwo\n"


def test_one_byte_too_many_is_refused_whatever_the_system_says_of_the_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123456789")
    with pytest.raises(OSError, match="larger than"):
        read_bytes(tmp_path / "a", limit=8)
    with pytest.raises(OSError, match="larger than"):
        read_bytes("/proc/self/status", limit=8)  # states a size of 0


@pytest.mark.parametrize("kind", PLACED)
def test_what_is_no_small_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    make, words = PLACED[kind]
    make(tmp_path / "a.json")
    for read in (read_bytes, read_text, read_json):
        with pytest.raises(OSError, match=words):
            read(tmp_path / "a.json")
    with pytest.raises(OSError, match=words):
        require_regular_files(tmp_path, suffixes=(".json",))


def test_sockets_and_directories_are_no_files(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
        with pytest.raises(OSError, match="it is a socket"):
            read_bytes(tmp_path / "s")
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


NO_DATA = dict.fromkeys(["data_args_path", "per_split_data_args_path", "data_path"])
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("run.yaml", lambda path: read_yaml(str(path))),
    "names of data": ("data.txt", lambda path: with_data_files(NO_DATA | {"data_args_path": str(path)})),
    "manifest": (manifest_path("data").name, lambda path: read_manifest(str(path.parent / "data"))),
    "tokenizer": ("tokenizer.json", lambda path: load_auto_tokenizer(str(path.parent))),
    "teacher": ("generation_config.json", lambda path: read_config(path.parent, trust_remote_code=False)),
}


@pytest.mark.parametrize("kind", PLACED)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_it_in_one_line(reader: str, kind: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    for other in ("config.json", "tokenizer_config.json"):
        (tmp_path / other).write_text("{}")
    PLACED[kind][0](tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", PLACED)
def test_tracker_metrics_lock_and_checkpoint(kind: str, tmp_path: Path) -> None:
    make, words = PLACED[kind]
    for name in (TRACKER, METRICS_FILE, "manifest.json"):
        make(tmp_path / name)
    assert read_tracker(tmp_path) is None
    assert find_damage(tmp_path) == "manifest.json cannot be read"
    with pytest.raises(OSError, match=words):
        drop_rows_past(tmp_path / METRICS_FILE, 3)
    if kind != "large":
        make(tmp_path / LOCK_FILE)
        with pytest.raises(ConfigError, match=f"{LOCK_FILE} cannot be opened .{words}"):
            lock_directory(tmp_path, wait=0)
        with pytest.raises(OSError, match=words):
            sha256_of(tmp_path / TRACKER)


# Who opens a file by himself, and why that is right.
ALONE = {
    "megatron_let/data/raw_stream.py": "raw text may come out of a pipe",
    "megatron_let/data/fast_encoder.py": "/proc",
    "megatron_let/mcore/index_cache.py": "puts on the disk what it has just written",
    "megatron_let/mcore/checkpoint_writer.py": "reads back what it has just written",
    "tools/long_run.py": "/proc",
    "tools/benchmark_ours.py": "/proc",
    "tools/fault_drill.py": "/proc",
    "tools/fault_drill_plan.py": "damages a file of its own run",
    "tools/build_stdlib_corpus.py": "Python's own source",
    "tools/benchmark_data.py": "times reading itself, and runs as a text in another process",
}


def reads(tree: ast.AST) -> Iterator[int]:
    """Yield the lines on which a file is opened for reading, or read, without `regular_files`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        is_method = isinstance(called, ast.Attribute)
        if is_method and name in ("read_text", "read_bytes"):
            yield node.lineno
        is_other = is_method and (
            ast.unparse(called).startswith("os.")
            or any(not isinstance(each, ast.Constant) for each in node.args)
        )
        if name == "open" and not is_other:
            modes = [
                each.value
                for each in (*node.args, *(word.value for word in node.keywords if word.arg == "mode"))
                if isinstance(each, ast.Constant) and isinstance(each.value, str)
            ]
            words = [mode for mode in modes if set(mode) <= set("rwabx+t")]
            if not words or words[0].startswith("r"):
                yield node.lineno


def test_nobody_reads_a_file_past_the_one_reader() -> None:
    found = {}
    for path in (*sorted((ROOT / "megatron_let").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))):
        name = str(path.relative_to(ROOT))
        lines = list(reads(ast.parse(path.read_text())))
        if lines and not name.startswith("megatron_let/testing/"):
            found[name] = lines
    strange = {name: lines for name, lines in found.items() if name not in ALONE}
    assert strange == {}, "read them with megatron_let.regular_files, or say here why not"
    assert sorted(ALONE.keys() - found.keys()) == []


@pytest.mark.parametrize(
    "line",
    [
        "open(p)",
        "open(p, 'rb')",
        "p.open()",
        "p.open('rb')",
        "p.read_text()",
        "Path(p).read_bytes()",
        "p.open('r+b')",
    ],
)
def test_the_scan_sees_a_reader(line: str) -> None:
    assert list(reads(ast.parse(line))) == [1]


@pytest.mark.parametrize(
    "line", ["p.open('w')", "open(p, 'a')", "os.open(p, flags)", "bench.open(stack, 'x')"]
)
def test_the_scan_minds_no_writer(line: str) -> None:
    assert list(reads(ast.parse(line))) == []
