"""The program that looks for findings: that it finds what a use does wrongly, and nothing in a few seconds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import guided
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed (pip install -e '.[fuzz]'; Linux, CPython 3.11 to 3.13)",
)


def run(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a directory of its own, with this project's modules."""
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@needs_atheris
def test_nothing_is_found_in_a_few_seconds(tmp_path: Path) -> None:
    result = run(["-m", "tests.fuzz.guided", "all", "--seconds", "3"], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    found = re.search(r"all: (\d+) executions, branches reached: (\d+) to (\d+), findings: 0", result.stdout)
    assert found is not None, result.stdout
    tries, first, last = map(int, found.groups())
    assert tries > 18, "more than the honest inputs"
    assert last >= first > 500
    assert list(tmp_path.iterdir()) == []


def test_without_atheris_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert guided.main(["idx"]) == 2
    assert capsys.readouterr().err == (
        "atheris is not installed: pip install -e '.[fuzz]' (Linux, CPython 3.11 to 3.13); "
        "pytest tests/fuzz needs none\n"
    )


WATCHED = """
import os, pickle, shutil, socket, subprocess, sys
from pathlib import Path
from tests.fuzz.watch import Watch

outside, inside = Path("outside").resolve(), Path("inside").resolve()
os.chdir(inside)
watch = Watch(inside)
actions = {
    "write": lambda: (outside / "a").write_text("x"),
    "write by ..": lambda: Path("../outside/a").write_text("x"),
    "write where reading is allowed": lambda: os.close(os.open(sys.modules[Watch.__module__].__file__, os.O_WRONLY)),
    "read": lambda: Path("/etc/passwd").read_text(),
    "read by a link": lambda: (inside / "link").read_text(),
    "mkdir": lambda: (outside / "b").mkdir(),
    "remove": lambda: (outside / "there").unlink(),
    "rename": lambda: (inside / "there").rename(outside / "c"),
    "system": lambda: os.system("true"),
    "Popen": lambda: subprocess.run(["true"]),
    "fork": lambda: os.fork(),
    "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
    "pickle": lambda: pickle.loads(b"cos\\nsystem\\n."),
    "code out of a text": lambda: eval("1 + 1"),
    "code of the directory": lambda: exec(compile("1", str(inside / "own.py"), "exec")),
    "swallowed": lambda: shutil.rmtree(outside, ignore_errors=True),
    "all is well": lambda: (inside / "there").read_text() + str((inside / "new").write_text("x")),
}
for name, action in actions.items():
    try:
        with watch.use():
            action()
    except AssertionError as error:
        print(name)
"""


def test_what_no_use_may_do_is_stopped_and_told(tmp_path: Path) -> None:
    for name in ("outside", "inside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "there").write_text("x")
    (tmp_path / "inside" / "link").symlink_to("/etc/passwd")
    result = run(["-c", WATCHED], tmp_path)
    assert result.returncode == 0, result.stderr
    names = re.findall(r'^    "([^"]+)": lambda', WATCHED, re.MULTILINE)
    assert len(names) == 17
    assert result.stdout.splitlines() == names[:-1]
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["there"]
    assert (tmp_path / "inside" / "new").exists()
