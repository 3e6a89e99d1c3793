"""Checkpoint directories: what counts as whole, what each kind of damage is called, in which order a save ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_let.errors import ConfigError
from megatron_let.training import checkpoint_files as files


def write(root: Path, iteration: int) -> Path:
    """Write a small whole checkpoint and return its directory."""
    partial = files.prepare_partial(root, iteration)
    (partial / "a.distcp").write_bytes(bytes(range(256)) * iteration)
    (partial / "b.distcp").write_bytes(b"b" * 1000)
    (partial / ".metadata").write_bytes(b"m")
    files.finish(root, iteration, files.describe_files(partial))
    return files.iteration_directory(root, iteration)


def test_a_finished_checkpoint_is_whole_and_the_newest(tmp_path: Path) -> None:
    directory = write(tmp_path, 100)
    assert directory.name == "iter_0000100"
    assert files.find_damage(directory) is None
    assert files.read_tracker(tmp_path) == 100
    assert not files.partial_directory(tmp_path, 100).exists()
    assert sorted(json.loads((directory / "manifest.json").read_text())["files"]) == [
        ".metadata",
        "a.distcp",
        "b.distcp",
    ]


def test_iterations_are_listed_newest_first_and_partial_ones_are_not(tmp_path: Path) -> None:
    for iteration in (9, 100, 20, 12_345_678):
        write(tmp_path, iteration)
    files.prepare_partial(tmp_path, 200)
    (tmp_path / "iter_300").mkdir()  # too few digits
    (tmp_path / "iter_0000400").write_text("a file, not a directory")
    (tmp_path / "iter_0000500_old").mkdir()
    assert files.saved_iterations(tmp_path) == [12_345_678, 100, 20, 9]
    assert files.newest_iteration_directory(tmp_path).name == "iter_12345678"


def test_without_a_checkpoint_there_is_no_newest(tmp_path: Path) -> None:
    assert files.saved_iterations(tmp_path / "absent") == []
    files.prepare_partial(tmp_path, 5)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        files.newest_iteration_directory(tmp_path)


def damage(directory: Path, kind: str) -> None:
    """Damage a checkpoint of `write`."""
    manifest, victim = directory / "manifest.json", directory / "a.distcp"
    content = victim.read_bytes()
    if kind == "missing":
        victim.unlink()
    elif kind == "a directory":
        victim.unlink()
        victim.mkdir()
    elif kind == "cut off":
        victim.write_bytes(content[:-1])
    elif kind == "too long":
        victim.write_bytes(content + b"\0")
    elif kind == "one bit":
        victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif kind == "empty":
        victim.write_bytes(b"")
    elif kind == "no manifest":
        manifest.unlink()
    else:
        text = {"torn manifest": manifest.read_text()[:40], "no files": "{}", "other JSON": "[1]"}[kind]
        manifest.write_text(text)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "a.distcp is missing"),
        ("a directory", "a.distcp is missing"),
        ("cut off", "a.distcp has 25599 bytes instead of 25600"),
        ("too long", "a.distcp has 25601 bytes instead of 25600"),
        ("empty", "a.distcp has 0 bytes instead of 25600"),
        ("one bit", "a.distcp does not match its checksum"),
        ("no manifest", "manifest.json is missing (not written by megatron_let, or not to its end)"),
        ("torn manifest", "manifest.json cannot be read"),
        ("no files", "manifest.json cannot be read"),
        ("other JSON", "manifest.json cannot be read"),
    ],
)
def test_each_kind_of_damage_is_named(kind: str, words: str, tmp_path: Path) -> None:
    directory = write(tmp_path, 100)
    damage(directory, kind)
    assert files.find_damage(directory) == words


def test_binary_garbage_in_the_manifest_is_damage(tmp_path: Path) -> None:
    directory = write(tmp_path, 100)
    (directory / "manifest.json").write_bytes(b"\xff\xfe\x00garbage")
    assert files.find_damage(directory) == "manifest.json cannot be read"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_that_share_the_work_see_every_file_once(world_size: int, tmp_path: Path) -> None:
    directory = write(tmp_path, 100)
    damage(directory, "one bit")
    found = [files.find_damage(directory, share=(rank, world_size)) for rank in range(world_size)]
    assert [f for f in found if f] == ["a.distcp does not match its checksum"]


def test_checksums_that_are_known_are_not_taken_again(tmp_path: Path) -> None:
    partial = files.prepare_partial(tmp_path, 100)
    (partial / "a.distcp").write_bytes(b"a")
    (partial / "b.distcp").write_bytes(b"b")
    known = {"a.distcp": {"bytes": 7, "sha256": "told"}}
    described = files.describe_files(partial, known=known)
    assert described["a.distcp"] == known["a.distcp"]
    assert described["b.distcp"] == {"bytes": 1, "sha256": hashlib.sha256(b"b").hexdigest()}


def test_sizes_alone_tell_a_cut_file_and_not_a_flipped_bit(tmp_path: Path) -> None:
    directory = write(tmp_path, 100)
    damage(directory, "one bit")
    assert files.find_damage(directory, sizes_only=True) is None
    damage(directory, "cut off")
    assert files.find_damage(directory, sizes_only=True) == "a.distcp has 25599 bytes instead of 25600"


def test_deleting_keeps_the_newest_whole_ones_and_those_at_the_interval(tmp_path: Path) -> None:
    for iteration in range(10, 80, 10):
        write(tmp_path, iteration)
    damage(files.iteration_directory(tmp_path, 70), "cut off")
    assert files.delete_older(tmp_path, keep_last=2, retain_interval=20) == [30, 10]
    assert files.saved_iterations(tmp_path) == [70, 60, 50, 40, 20]
    assert files.delete_older(tmp_path, keep_last=2, retain_interval=None) == [40, 20]
    assert not list(tmp_path.glob("*.partial"))


def roll_back(root: Path) -> None:
    """Save up to iteration 16, go back to 4, and save 8 again."""
    for iteration in (4, 8, 12, 16, 8):
        write(root, iteration)


def test_what_was_saved_last_stays_after_a_rollback_and_not_what_has_the_highest_number(
    tmp_path: Path,
) -> None:
    roll_back(tmp_path)
    assert files.in_order_of_saving(tmp_path) == [8, 16, 12, 4]
    assert files.delete_older(tmp_path, keep_last=2, retain_interval=None, spared=(8, 4)) == [12]
    write(tmp_path, 11)
    assert files.delete_older(tmp_path, keep_last=2, retain_interval=None, spared=(11, 4)) == [16]
    assert files.saved_iterations(tmp_path) == [11, 8, 4]


def test_spared_checkpoints_stay_beside_those_of_the_interval(tmp_path: Path) -> None:
    roll_back(tmp_path)
    assert files.delete_older(tmp_path, keep_last=1, retain_interval=16, spared=(8, 4)) == [12]
    assert files.delete_older(tmp_path, keep_last=1, retain_interval=16) == [4]


def test_a_resume_tries_what_the_tracker_names_then_what_led_there_then_the_rest(tmp_path: Path) -> None:
    roll_back(tmp_path)
    assert files.resume_order(tmp_path) == [8, 4, 16, 12]
    write(tmp_path, 11)
    assert files.resume_order(tmp_path) == [11, 8, 4, 16, 12]
    files.write_tracker(tmp_path, 12)
    assert files.resume_order(tmp_path) == [12, 11, 8, 4, 16]
    for tracker in ("13", "release", ""):
        (tmp_path / files.TRACKER).write_text(tracker)
        assert files.resume_order(tmp_path) == [11, 8, 4, 16, 12]
    assert files.newest_iteration_directory(tmp_path).name == "iter_0000011"


@pytest.mark.parametrize("value", ["-1", "1.5", '"late"', "[]", "null", "9" * 30])
def test_a_manifest_that_does_not_say_when_it_was_saved_counts_as_the_oldest(
    value: str, tmp_path: Path
) -> None:
    for iteration in (10, 20, 30):
        manifest = write(tmp_path, iteration) / files.MANIFEST
        if iteration > 10:
            saved = json.loads(manifest.read_text())["saved"]
            manifest.write_text(manifest.read_text().replace(str(saved), value))
    assert files.in_order_of_saving(tmp_path) == [10, 30, 20]


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_part_of_it(tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    with patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        files.delete_older(tmp_path, keep_last=2, retain_interval=None)
    assert files.saved_iterations(tmp_path) == [30, 20]
    assert len(list(tmp_path.glob("*.partial"))) == 1
    files.prepare_partial(tmp_path, 40)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["iter_0000040.partial"]


def test_a_directory_that_no_save_named_is_not_removed(tmp_path: Path) -> None:
    for name in ("iter_best.partial", "iter_0000010.mine.partial", "iter_0000010.partial", "iter_7.partial"):
        (tmp_path / name).mkdir()
    files.prepare_partial(tmp_path, 40)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "iter_0000010.mine.partial",
        "iter_0000040.partial",
        "iter_7.partial",
        "iter_best.partial",
    ]


def test_what_cannot_be_removed_is_no_checkpoint_and_stops_no_save(tmp_path: Path) -> None:
    """A network file system refuses to remove what another program has open."""
    write(tmp_path, 10)
    with patch.object(os, "rmdir", side_effect=OSError(errno.ENOTEMPTY, "Directory not empty")):
        write(tmp_path, 10)
        assert files.saved_iterations(tmp_path) == [10]
        write(tmp_path, 20)
    write(tmp_path, 30)
    assert files.saved_iterations(tmp_path) == [30, 20, 10]
    assert not list(tmp_path.glob("*.partial"))


def test_a_manifest_does_not_lead_out_of_its_directory(tmp_path: Path) -> None:
    directory = write(tmp_path, 100)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["../latest_checkpointed_iteration.txt"] = {"bytes": 4, "sha256": ""}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert files.find_damage(directory) is not None


@pytest.mark.parametrize("content", [b"", b"release", b"-3", b"1.5", b"\xff\xfe", b"12 13"])
def test_a_tracker_without_a_number_is_no_tracker(content: bytes, tmp_path: Path) -> None:
    (tmp_path / files.TRACKER).write_bytes(content)
    assert files.read_tracker(tmp_path) is None


def test_the_tracker_is_a_number_and_a_line_end(tmp_path: Path) -> None:
    assert files.read_tracker(tmp_path) is None
    files.write_tracker(tmp_path, 70)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "70\n"
    (tmp_path / files.TRACKER).write_text("  80 \n")
    assert files.read_tracker(tmp_path) == 80


@pytest.mark.parametrize("step", ["write_atomically", "rename", "write_tracker"])
def test_a_kill_at_any_step_of_finish_leaves_a_whole_newest_checkpoint(step: str, tmp_path: Path) -> None:
    """The order is manifest, rename, tracker: killed before one of them, no torn checkpoint has a final name."""
    write(tmp_path, 100)
    partial = files.prepare_partial(tmp_path, 200)
    (partial / "a.distcp").write_bytes(b"new")
    described = files.describe_files(partial)
    target = (Path, "rename") if step == "rename" else (files, step)
    with patch.object(*target, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        files.finish(tmp_path, 200, described)
    assert files.newest_iteration_directory(tmp_path).name == "iter_0000100"  # as the tracker says
    saved_last = files.iteration_directory(tmp_path, files.in_order_of_saving(tmp_path)[0])
    assert files.find_damage(saved_last) is None
    assert saved_last.name == ("iter_0000200" if step == "write_tracker" else "iter_0000100")
    assert files.read_tracker(tmp_path) == 100
    assert files.find_damage(files.iteration_directory(tmp_path, 100)) is None


def test_the_next_attempt_clears_what_an_earlier_one_left(tmp_path: Path) -> None:
    partial = files.prepare_partial(tmp_path, 100)
    (partial / "torn").write_text("half")
    assert list(files.prepare_partial(tmp_path, 100).iterdir()) == []


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 100)
    partial = files.prepare_partial(tmp_path, 100)
    (partial / "c.distcp").write_text("again")
    files.finish(tmp_path, 100, files.describe_files(partial))
    directory = files.iteration_directory(tmp_path, 100)
    assert {entry.name for entry in directory.iterdir()} == {"c.distcp", "manifest.json"}
    assert files.find_damage(directory) is None


def test_an_interrupted_write_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomically(path, "old")
    with patch.object(Path, "replace", side_effect=OSError), pytest.raises(OSError):  # noqa: PT011
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
