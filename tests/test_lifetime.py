"""Forked helpers of a program end with it, whatever ended it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import HANG_SECONDS, is_running

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux's kernel promises it"
)

# Forks a child that does nothing, in the main thread or in one that ends at once, and tells its id.
PROGRAM = """
import os, sys, threading, time
from megatron_let.lifetime import take_children_along
if "take" in sys.argv:
    take_children_along()
def fork():
    child = os.fork()
    if child == 0:
        time.sleep(100)
    print(child, flush=True)
if "thread" in sys.argv:
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
else:
    fork()
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("words", "ends_with_parent"), [(["take"], True), ([], False), (["take", "thread"], False)]
)
def test_a_forked_child_ends_with_a_killed_parent(words: list[str], ends_with_parent: bool) -> None:
    """One that was forked in a thread outlives that thread, for which the kernel would kill it."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        child = int(program.stdout.readline())
        try:
            time.sleep(0.3)
            assert is_running(child)
            program.kill()
            program.wait()
            deadline = time.monotonic() + (HANG_SECONDS if ends_with_parent else 0.5)
            while is_running(child) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert is_running(child) == (not ends_with_parent)
        finally:
            if is_running(child):
                os.kill(child, signal.SIGKILL)
