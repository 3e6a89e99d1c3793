"""The working directory of a run: one run at a time, a journal that is whole or absent, nothing left without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_let.data.journal import Journal, WorkingDirectory, changed_arguments
from megatron_let.errors import ConfigError
from tests.processes import HANG_SECONDS

JOURNAL = Journal({"--append-eod": True}, {"source": 1})

HOLD = """
import sys
from megatron_let.data.journal import Journal, WorkingDirectory
directory = WorkingDirectory(sys.argv[1])
directory.write_journal(Journal({}, {}))
print("held", flush=True)
sys.stdin.read()
"""


def test_what_was_noted_is_read_back(tmp_path: Path) -> None:
    prefix = str(tmp_path / "out")
    with WorkingDirectory(prefix) as directory:
        assert directory.read_journal() is None
        directory.write_journal(JOURNAL)
    with WorkingDirectory(prefix) as directory:
        assert directory.read_journal() == JOURNAL
        directory.write_journal(Journal({}, {}, installing=True))
        assert directory.read_journal() == Journal({}, {}, installing=True)
        assert sorted(path.name for path in directory.path.iterdir()) == ["journal.json", "lock"]


def test_a_directory_without_a_journal_is_not_left_behind(tmp_path: Path) -> None:
    with WorkingDirectory(str(tmp_path / "out")) as directory:
        (directory.path / "0000.bin").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_clearing_and_removing(tmp_path: Path) -> None:
    with WorkingDirectory(str(tmp_path / "out")) as directory:
        directory.write_journal(JOURNAL)
        (directory.path / "0000.bin").write_bytes(b"x")
        directory.clear()
        assert [path.name for path in directory.path.iterdir()] == ["lock"]
        directory.remove()
        assert list(tmp_path.iterdir()) == []


def test_the_journal_goes_first_and_the_lock_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kill in the middle leaves is nothing to go on from, and held by the one who deletes it."""
    with WorkingDirectory(str(tmp_path / "out")) as directory:
        for name in ("0000.bin", "0001.lengths", "merged.idx"):
            (directory.path / name).write_bytes(b"x")
        directory.write_journal(JOURNAL)
        deleted: list[str] = []
        original = Path.unlink

        def unlink(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                deleted.append(path.name)
            original(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "unlink", unlink)
        directory.remove()
    assert deleted[0] == "journal.json"
    assert deleted[-1] == "lock"
    assert len(deleted) == 5


@pytest.mark.parametrize("name", ["00.jsonl", "lock", "journal.json", "0000.bin", "sub"])
def test_a_directory_that_no_run_made_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    place = tmp_path / "out.partial" / name
    place.parent.mkdir()
    place.mkdir() if name == "sub" else place.write_text("the only copy")
    with pytest.raises(ConfigError, match=rf"out\.partial is not of this program.*\({name} lies there\)"):
        WorkingDirectory(str(tmp_path / "out"))
    assert [path.name for path in place.parent.iterdir()] == [name]
    assert name == "sub" or place.read_text() == "the only copy"


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "journal.json", "0000.bin"]])
def test_what_an_early_kill_or_an_older_version_left_is_taken_over(tmp_path: Path, left: list[str]) -> None:
    directory = tmp_path / "out.partial"
    directory.mkdir()
    for name in left:
        (directory / name).write_text("")
    with WorkingDirectory(str(tmp_path / "out")) as taken:
        taken.clear()
    assert list(tmp_path.iterdir()) == []


def test_somebodys_file_in_the_directory_of_a_run_outlives_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # and the next run takes the directory over as well
        with WorkingDirectory(str(tmp_path / "out")) as directory:
            directory.write_journal(JOURNAL)
            (directory.path / "00.jsonl").write_text("the only copy")
            (directory.path / "0000.bin").write_bytes(b"x")
            directory.remove()
        assert sorted(path.name for path in directory.path.iterdir()) == ["00.jsonl", "lock"]
        assert "out.partial stays: 00.jsonl in it is not of this program" in caplog.text


@pytest.mark.parametrize("given", ["out.partial", "out.partial/0000.bin", "out.partial/*.jsonl", "linked/x"])
def test_an_input_in_the_directory_is_refused_before_it_is_touched(tmp_path: Path, given: str) -> None:
    with WorkingDirectory(str(tmp_path / "out")) as directory:
        (directory.path / "0000.bin").write_text("the only copy")
        directory.path.rename(tmp_path / "away")  # as a kill leaves it
    (tmp_path / "away").rename(directory.path)
    (tmp_path / "linked").symlink_to("out.partial")
    with pytest.raises(
        ConfigError, match=r"^input .* lies in .*out\.partial, where .* another --output-prefix$"
    ):
        WorkingDirectory(str(tmp_path / "out"), [str(tmp_path / given)])
    assert (directory.path / "0000.bin").read_text() == "the only copy"


def test_a_directory_that_was_removed_is_not_removed_again(tmp_path: Path) -> None:
    prefix = str(tmp_path / "out")
    with WorkingDirectory(prefix) as first:
        first.remove()
        with WorkingDirectory(prefix) as second:
            second.write_journal(JOURNAL)
    assert (tmp_path / "out.partial" / "journal.json").exists()


def test_a_journal_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkingDirectory(str(tmp_path / "out")) as directory:
        directory.write_journal(JOURNAL)

        def fail(path: Path, text: str) -> None:
            path.write_text(text[:10])
            raise KeyboardInterrupt

        monkeypatch.setattr("megatron_let.data.journal.write_synced", fail)
        with pytest.raises(KeyboardInterrupt):
            directory.write_journal(Journal({}, {}, installing=True))
        assert directory.read_journal() == JOURNAL


def test_a_second_run_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    prefix = str(tmp_path / "out")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, prefix], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="another run is writing"):
        WorkingDirectory(prefix)
    holder.kill()
    holder.communicate(timeout=HANG_SECONDS)
    with WorkingDirectory(prefix) as directory:
        assert directory.read_journal() == Journal({}, {})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        '{"version": 1}',
        '{"version": 2, "arguments": {}, "progress": {}, "installing": false}',
    ],
)
def test_a_journal_that_cannot_be_read_is_one_line(tmp_path: Path, content: str) -> None:
    with WorkingDirectory(str(tmp_path / "out")) as directory:
        (directory.path / "journal.json").write_text(content)
        with pytest.raises(ConfigError, match=r"cannot go on from .*journal.json .*give --restart"):
            directory.read_journal()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*File exists|cannot write .*Not a directory"):
        WorkingDirectory(str(tmp_path / "file" / "out"))


def test_changes_are_told_in_words() -> None:
    before = {"--append-eod": True, "--json-keys": ["text"], "--old": 1}
    now = {"--append-eod": False, "--json-keys": ["text"], "--new": "x" * 100}
    told = changed_arguments(now, before)
    assert told == f"--append-eod was True, is False; --old was 1, is None; --new was None, is {'x' * 77}..."
    assert changed_arguments(now, now) == ""
