"""Which of several failed workers failed first, and what to say about it."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_let.errors import EXIT_BAD_CONFIGURATION, EXIT_BAD_NUMBERS, EXIT_PREEMPTED
from megatron_let.exit_status import FailureRecord, signal_name

# Codes with a meaning of their own: a worker that ends with one has said why.
DOCUMENTED_CODES = (EXIT_BAD_CONFIGURATION, EXIT_PREEMPTED, EXIT_BAD_NUMBERS)
_HINTS: Mapping[int, str] = MappingProxyType(
    {
        signal.SIGKILL: " (often: the machine is out of memory)",
        signal.SIGBUS: " (often: a file was cut while it was read, or /dev/shm is full)",
    }
)


@dataclass(frozen=True)
class Failure:
    """One worker's end with something else than 0."""

    rank: int
    exit_code: int  # as the system gives it: minus n for signal n
    pid: int
    time: float  # when it was noticed, in whole seconds
    was_stopped: bool  # the launcher stopped it because of another's failure
    record: FailureRecord | None

    def shell_code(self) -> int:
        """Return the exit code as a shell counts it: 128 + n for signal n; that of the record, if it left one."""
        if self.record is not None:
            return self.record.exit_code
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code

    def text(self) -> str:
        """Return what a person should read last; empty when the worker has said it itself."""
        if self.record is not None:
            if self.record.traceback is None:
                return self.record.message
            return f"rank {self.rank}:\n{self.record.traceback.rstrip()}"
        if self.exit_code >= 0:
            if self.exit_code in DOCUMENTED_CODES:
                return ""
            return f"error: rank {self.rank} ended with exit code {self.exit_code}; its own output says why"
        hint = _HINTS.get(-self.exit_code, "")
        return f"error: rank {self.rank} (pid {self.pid}) was ended by {signal_name(-self.exit_code)}{hint}"


def first_failure(failures: Sequence[Failure]) -> Failure:
    """Return the failure that brought the others about.

    A worker that the launcher stopped before it had said anything comes last. A signal from elsewhere outranks all
    that was said: losing a peer is an exception to the others, and no exception kills a peer. (SIGABRT is the
    exception to that: it is how a communication watchdog leaves when a peer is gone.) Then a one-line error before a
    crash, which may be its echo, and the earlier before the later.
    """
    return min(failures, key=_order)


def _order(failure: Failure) -> tuple[bool, int, float, int]:
    """Return the key by which `first_failure` compares."""
    if failure.record is not None:
        return False, 1 if failure.record.traceback is None else 2, failure.record.time, failure.rank
    if failure.exit_code < 0 and failure.exit_code != -signal.SIGABRT:
        kind = 0
    else:
        kind = 1 if failure.exit_code in DOCUMENTED_CODES else 3
    return failure.was_stopped, kind, failure.time, failure.rank
