"""The tests' own surroundings: the same whoever starts them, and none is blamed for what another has left."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[1]

# Starts a program with signals ignored and blocked, as nohup, a background job or a careless parent does.
CARELESS = """
import os, signal, sys
for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGCHLD"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
os.umask(0o077)
os.execvp(sys.argv[1], sys.argv[1:])
"""

A_CHILD = """
import json, os, signal
ignored = [number.name for number in signal.Signals if signal.getsignal(number) == signal.SIG_IGN]
blocked = [number.name for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
names = [name for name in os.environ if name.startswith(("SLURM", "RANK", "SAVE", "COLUMNS"))]
print(json.dumps([ignored, blocked, names, os.umask(0)]))
"""

TESTS = f"""
import subprocess, sys

def test_child():
    done = subprocess.run([sys.executable, "-c", {A_CHILD!r}], capture_output=True, text=True, check=True)
    print("child:", done.stdout)

def test_running():
    subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE)

def test_fails():
    stream = open("/dev/null")
    raise AssertionError("of its own")

def test_blameless():
    import gc
    gc.collect()

def test_changes():
    import os, signal
    os.environ["RANK"] = "3"
    os.chdir("/")
    signal.signal(signal.SIGTERM, lambda number, frame: None)

def test_drops():
    class Held:
        pass
    held = Held()
    held.itself, held.stream = held, open("/dev/null")

def test_blameless_too():
    import gc, os
    gc.collect()
    assert "RANK" not in os.environ
"""


def test_what_is_inherited_changes_nothing_and_what_is_left_is_its_own_tests_fault(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(TESTS)
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "tests.conftest", "-rA"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", CARELESS, *command],
        cwd=ROOT,
        env={**os.environ, "SLURM_PROCID": "1", "RANK": "2", "SAVE": "x", "COLUMNS": "40"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    (told,) = re.findall("^child: (.*)$", done.stdout, re.MULTILINE)
    assert json.loads(told) == [["SIGPIPE", "SIGXFSZ"], [], [], 0o022]
    assert set(re.findall(r"^(FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE)) == {
        ("ERROR", "test_running"),
        ("FAILED", "test_fails"),
        ("ERROR", "test_changes"),
        ("ERROR", "test_drops"),
    }, done.stdout
    assert "the test leaves behind: the running `sleep 600`" in done.stdout
    for what in ("another working directory (/)", "changed variables (RANK)", "another action of SIGTERM"):
        assert what in done.stdout


def short_limits(tree: ast.AST) -> Iterator[float]:
    """Yield the limits that give something seconds of a test's own, fewer than a crowded machine may need."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "timeout" and isinstance(node.value, ast.Constant):
            seconds = node.value.value
            if isinstance(seconds, int | float) and seconds < HANG_SECONDS:
                yield seconds


def test_no_test_waits_by_a_limit_of_its_own() -> None:
    found = {
        str(path.relative_to(ROOT)): limits
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if (limits := list(short_limits(ast.parse(path.read_text()))))
    }
    passed_on_purpose = {"tests/testing/test_distributed.py": [0.5]}
    assert found == passed_on_purpose, "wait for tests.processes.HANG_SECONDS"
