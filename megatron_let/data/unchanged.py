"""Are the files of a data set still those that the run began with?

They are mapped into memory: what is written into them while a run reads would be trained on, and what is cut off ends the
reader by SIGBUS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_let.errors import ConfigError


@dataclass(frozen=True)
class PairState:
    """A pair of files as a run found it."""

    prefix: str
    states: tuple[tuple[int, int], ...]
    """(bytes, time of the last change in ns) of PREFIX.bin and PREFIX.idx."""

    def require_unchanged(self) -> None:
        """Compare with the files as they are now: two calls of the system.

        Raises:
            ConfigError: they were changed, cut or removed.
        """
        try:
            now = _states(self.prefix)
        except OSError as problem:
            raise ConfigError(
                f"{problem.filename} is gone while the run reads it ({problem.strerror}); {_CURE}"
            ) from problem
        for suffix, then, here in zip(_SUFFIXES, self.states, now, strict=True):
            if then != here:
                what = "written to" if then[0] == here[0] else f"changed from {then[0]} to {here[0]} bytes"
                raise ConfigError(f"{self.prefix}{suffix} was {what} while the run reads it; {_CURE}")


_SUFFIXES = (".bin", ".idx")
_CURE = "put the files back as they were and resume"


def state_of_pair(prefix: str) -> PairState:
    """Note the state of a data set's files.

    Raises:
        OSError: a file is not there.
    """
    return PairState(prefix, _states(prefix))


def _states(prefix: str) -> tuple[tuple[int, int], ...]:
    found = [os.stat(prefix + suffix) for suffix in _SUFFIXES]
    return tuple((state.st_size, state.st_mtime_ns) for state in found)
