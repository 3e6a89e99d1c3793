"""Are the files of a data set still those that the run began with?

They are mapped into memory: what is written into them while a run reads would be trained on, and what is cut off ends the
reader by SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_let.data.digests import add_samples
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER


@dataclass(frozen=True)
class PairState:
    """A pair of files as a run found it."""

    prefix: str
    states: tuple[tuple[int, int], ...]
    """(bytes, time of the last change in ns) of PREFIX.bin and PREFIX.idx."""
    digests: tuple[str, ...]
    """Of samples of their bytes: a `touch`, which keeps a file from being purged, changes the time alone."""

    def require_unchanged(self) -> PairState:
        """Compare with the files as they are now, by two calls of the system; return the state to compare with next.

        Raises:
            ConfigError: they were changed, cut or removed.
        """
        try:
            now = _states(self.prefix)
        except OSError as problem:
            raise ConfigError(
                f"{problem.filename} is gone while the run reads it ({problem.strerror}); {_CURE}"
            ) from problem
        if now == self.states:
            return self
        for suffix, then, here, digest in zip(_SUFFIXES, self.states, now, self.digests, strict=True):
            file = f"{self.prefix}{suffix}"
            if then[0] != here[0]:
                raise ConfigError(
                    f"{file} was changed from {then[0]} to {here[0]} bytes while the run reads it; {_CURE}"
                )
            if then != here and _digest(file) != digest:
                raise ConfigError(f"{file} was written to while the run reads it; {_CURE}")
        LOGGER.warning(f"{self.prefix}: touched while the run reads it; sizes and samples are the same")
        return replace(self, states=now)


_SUFFIXES = (".bin", ".idx")
_SAMPLES, _SAMPLE_BYTES = 8, 4096
_CURE = "put the files back as they were and resume"


def state_of_pair(prefix: str) -> PairState:
    """Note the state of a data set's files.

    Raises:
        OSError: a file is not there.
    """
    digests = tuple(_digest(prefix + suffix) for suffix in _SUFFIXES)
    return PairState(prefix, _states(prefix), digests)


def _states(prefix: str) -> tuple[tuple[int, int], ...]:
    found = [os.stat(prefix + suffix) for suffix in _SUFFIXES]
    return tuple((state.st_size, state.st_mtime_ns) for state in found)


def _digest(file: str) -> str:
    digest = hashlib.sha256()
    add_samples(digest, Path(file), _SAMPLES, sample_bytes=_SAMPLE_BYTES)
    return digest.hexdigest()
