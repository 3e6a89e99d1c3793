"""The lifetime of a started worker: it never outlives the one that started it, whatever ended that one.

Only Linux can promise this to a worker that hangs in a collective (a signal from the kernel); elsewhere the
functions do nothing and a launcher that is killed with SIGKILL leaves its workers to the communication timeout.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from functools import cache

LAUNCHER_PID_VARIABLE = "MEGATRON_LET_LAUNCHER_PID"
ELASTIC_RUN_VARIABLE = "TORCHELASTIC_RUN_ID"
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None, *, by: int = signal.SIGKILL) -> None:
    """Have the kernel send this worker a signal when its parent ends, and at once when the parent is gone already.

    `parent_pid` is the expected parent, when known. The signal is SIGKILL: a worker that waits in a collective for a peer
    that is gone would not get to run a Python handler of a gentler one. A later call replaces an earlier one's signal.
    """
    if not sys.platform.startswith("linux"):
        return
    expected = os.getppid() if parent_pid is None else parent_pid
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(by), 0, 0, 0)
    if os.getppid() != expected:  # the parent ended between its start of this worker and the call above
        os.kill(os.getpid(), by)


def has_bare_torchrun() -> bool:
    """Return whether torchrun itself started this rank: it may be ended by a signal that it does not pass on."""
    return ELASTIC_RUN_VARIABLE in os.environ and LAUNCHER_PID_VARIABLE not in os.environ


def die_with_launcher() -> None:
    """Tie this worker to the launcher that started it; do nothing when no launcher did.

    A run started from a shell by hand must survive that shell (`nohup`), so a parent counts only when
    `python -m megatron_let.launch` or torchrun left its mark in the environment.
    """
    if ELASTIC_RUN_VARIABLE not in os.environ:
        return
    launcher = os.environ.get(LAUNCHER_PID_VARIABLE)
    if launcher is not None and not _is_alive(int(launcher)):
        os._exit(128 + signal.SIGKILL)
    die_with_parent()


@cache
def take_children_along() -> None:
    """Have every program that this one forks from now on, in its main thread, end with it, however it ends.

    Data-loader workers and checkpoint writers are meant. The kernel ties a child to the thread that forked it, so that
    one forked in another thread, which may end early, is left alone. Started programs (exec) are not touched.
    """
    parent: list[int] = []

    def before() -> None:
        parent[:] = [os.getpid()] if threading.current_thread() is threading.main_thread() else []

    def in_child() -> None:
        signal.set_wakeup_fd(-1)  # what this child receives is not its parent's
        if parent:
            die_with_parent(parent[0])

    os.register_at_fork(before=before, after_in_child=in_child)


def leave_signals_to_parent() -> None:
    """Let SIGTERM and SIGUSR1 end this forked worker only when they come from its parent.

    A scheduler that signals every process of a job would otherwise end the data-loader workers of a rank that wants
    to save and leave. Linux only: elsewhere nothing changes.
    """
    if not hasattr(signal, "sigwaitinfo") or not sys.platform.startswith("linux"):
        return
    numbers = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    threading.Thread(target=_heed, args=(os.getppid(), numbers), daemon=True).start()


def _heed(parent_pid: int, numbers: set[signal.Signals]) -> None:
    """Wait for a signal from the parent, then end."""
    while signal.sigwaitinfo(numbers).si_pid != parent_pid:
        continue
    os._exit(0)


def _is_alive(pid: int) -> bool:
    """Return whether a running program has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
