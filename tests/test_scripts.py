"""The shell scripts and the lock files, without a network: a stand-in for Python notes what it is asked to do."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    *sorted((ROOT / "scripts").glob("*.sh")),
    *sorted((ROOT / "scripts" / "slurm").iterdir()),
    ROOT / ".ci" / "run",
]

# Passes everything on to the true Python except making environments and installing packages, which it notes.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && echo venv >>"$NOTES" ;;
    *"pip --version"*) ;;
    "-m pip"*) echo "pip ${*: -2}" >>"$NOTES" && [ -z "${FAIL_PIP:-}" ] ;;
    *) exec python3 "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a small copy of the repository, in a path with a space, with the stand-in beside it."""
    copy = tmp_path / "a checkout"
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, copy / name)
    (copy / "megatron_let").mkdir()
    shutil.copy(ROOT / "megatron_let" / "__init__.py", copy / "megatron_let")
    shutil.copy(ROOT / "setup.py", copy)
    stand_in = tmp_path / "stand_in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return copy


def set_up(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up from another directory and return how it ended."""
    notes = checkout.parent / "notes"
    notes.write_text("")
    variables = {
        **os.environ,
        "PYTHON": str(checkout.parent / "stand_in"),
        "NOTES": str(notes),
        **environment,
    }
    return subprocess.run(
        ["bash", str(checkout / "scripts" / "setup_venv.sh"), "requirements/test.txt"],
        cwd="/",
        env=variables,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def notes_of(checkout: Path) -> list[str]:
    """Return what the stand-in was asked to do in the last set-up."""
    return (checkout.parent / "notes").read_text().splitlines()


def test_the_set_up_installs_once_and_again_only_when_the_lock_changed(checkout: Path) -> None:
    first = set_up(checkout)
    assert first.returncode == 0, first.stderr
    assert notes_of(checkout) == ["venv", f"pip -r {checkout}/requirements/test.txt", f"pip -e {checkout}"]
    assert set_up(checkout).returncode == 0
    assert notes_of(checkout) == []
    with (checkout / "requirements" / "cpu.txt").open("a") as lock:  # test.txt includes it
        lock.write("einops==0.8.0\n")
    set_up(checkout)
    assert len(notes_of(checkout)) == 2


def test_an_installation_that_failed_is_done_again(checkout: Path) -> None:
    assert set_up(checkout, FAIL_PIP="1").returncode != 0
    assert set_up(checkout).returncode == 0
    assert len(notes_of(checkout)) == 2


def test_a_missing_or_old_python_is_one_clear_line(checkout: Path) -> None:
    missing = set_up(checkout, PYTHON="python-of-nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: python-of-nowhere not found; install Python 3.10 or newer")
    old = checkout.parent / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    refused = set_up(checkout, PYTHON=str(old))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: Python 3.9.2 is too old")


def test_a_python_without_venv_is_one_clear_line(checkout: Path) -> None:
    bare = checkout.parent / "bare"
    bare.write_text('#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexit 0\n')
    bare.chmod(0o755)
    refused = set_up(checkout, PYTHON=str(bare))
    assert refused.returncode == 2
    assert "has no venv module" in refused.stderr


def test_the_lock_pins_every_package_exactly_and_holds_all_that_setup_names() -> None:
    lines = {
        name: [
            line
            for line in (ROOT / "requirements" / name).read_text().splitlines()
            if line and line[0] != "#"
        ]
        for name in ("cpu.txt", "test.txt")
    }
    pin = re.compile(r'[a-z0-9-]+==[0-9a-z.]+( ; python_version (<|>=) "3\.11")?')
    assert [line for line in lines["cpu.txt"] if not pin.fullmatch(line)] == []
    assert [line for line in lines["test.txt"] if not pin.fullmatch(line)] == ["-r cpu.txt"]
    locked = {line.split("==")[0] for line in lines["cpu.txt"]}
    assert required_by_setup() <= locked
    assert "apex" not in locked


def required_by_setup() -> set[str]:
    """Return the names in `install_requires` of setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return {re.split(r"[^a-z0-9-]", requirement)[0] for requirement in ast.literal_eval(node.value)}
    raise AssertionError("setup.py names no requirements")


@pytest.mark.parametrize(("user", "apt", "said"), [(0, 0, ""), (0, 1, "could not be installed"), (7, 1, "")])
def test_continuous_integration_ends_as_the_test_script_whatever_can_be_installed(
    user: int, apt: int, said: str, checkout: Path
) -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    shutil.copytree(ROOT / ".ci", checkout / ".ci")
    (checkout / "scripts" / "test.sh").write_text("echo tested $# && exit 5\n")
    for name, text in (("id", f"echo {user}"), ("apt-get", f'echo "$*" >>"$NOTES"; exit {apt}')):
        (checkout / name).write_text(f"#!/bin/sh\n{text}\n")
        (checkout / name).chmod(0o755)
    notes = checkout / "notes"
    notes.touch()
    environment = {**os.environ, "PATH": f"{checkout}:{os.environ['PATH']}", "NOTES": str(notes)}
    done = subprocess.run(
        [checkout / ".ci" / "run"], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert done.stdout.endswith("tested 0\n")
    assert said in done.stdout
    assert (done.stdout.count("\n") == 2) == bool(said)
    assert len(notes.read_text().splitlines()) == (0 if user else 1 + (apt == 0))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", *SCRIPTS], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error(script: Path) -> None:
    assert "set -euo pipefail" in script.read_text()
