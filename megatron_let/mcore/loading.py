"""Microbatches out of torch's data loader, whose failures are told by what they are: which file, which worker, how it ended.

A worker that is killed shows itself in several ways, and which is first is chance: a connection that is reset, an empty
queue, SIGCHLD. All end in one line here.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import DataLoader

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError, LetError
from megatron_let.exit_status import signal_name
from megatron_let.limits import free_shared_memory

Sample = dict[str, torch.Tensor]

_DEATH_SECONDS = 5.0
"""A dying worker closes its connections first; it is gone within moments."""
_SIGNS_OF_DEATH = (OSError, EOFError, pickle.UnpicklingError)
_HINTS = {
    -signal.SIGKILL: " (often: the machine is out of memory; fewer --num-workers need less)",
    -signal.SIGBUS: " (often: /dev/shm is full; enlarge it, or --num-workers 0 does without)",
}
_PREFETCHED = 2
"""Microbatches that torch has each worker prepare ahead."""
_LOCK_BYTES = 1 << 20
"""More than the locks of a rank's queues take."""


class LoaderError(LetError):
    """A worker of the data loader has ended; the line says which, and how."""


class LoadedMicrobatches(Iterator[Sample]):
    """The microbatches of a data loader, in order.

    `require_data` raises ConfigError when the data are no longer what they were: the cause of whatever has gone wrong.
    """

    def __init__(
        self, loader: DataLoader[Sample], *, rank: int, require_data: Callable[[], None] = lambda: None
    ) -> None:
        self._rank = rank
        self._require_data = require_data
        is_main = threading.current_thread() is threading.main_thread()
        action = signal.getsignal(signal.SIGCHLD)
        self._iterator = iter(loader)
        # torch's action would raise wherever the main thread happens to be, a save included.
        if is_main:
            signal.signal(signal.SIGCHLD, action)

    def __next__(self) -> Sample:
        """Return the next microbatch.

        Raises:
            ConfigError: the data were changed while they are read.
            LoaderError: a worker has ended.
        """
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            workers: Sequence[BaseProcess] = getattr(self._iterator, "_workers", ())
            self._require_data()
            may_be_dying = isinstance(error, _SIGNS_OF_DEATH)
            ended = _ended(workers, within=_DEATH_SECONDS if may_be_dying else 0.0)
            if ended is None:
                raise
            self._require_data()  # what ends a worker by SIGBUS may have come between
            raise LoaderError(self._describe(ended, workers[ended])) from error

    def _describe(self, number: int, worker: BaseProcess) -> str:
        code = worker.exitcode or 0
        how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return (
            f"data-loader worker {number} (pid {worker.pid}) of rank {self._rank} {how}{_HINTS.get(code, '')}"
        )


def require_shared_memory(config: RunConfig) -> None:
    """Check that /dev/shm holds what the data loaders of this node's ranks keep there.

    Raises:
        ConfigError: it does not; the workers would end by SIGBUS.
    """
    training, workers = config.training, config.data.num_workers
    free = free_shared_memory()
    if workers == 0 or free is None:
        return
    # Two tensors of 8-byte ids a microbatch, a file of whole pages each.
    pages = -(-training.micro_batch_size * config.model.seq_length * 8 // mmap.PAGESIZE)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = ranks * ((workers * _PREFETCHED + 1) * 2 * pages * mmap.PAGESIZE + _LOCK_BYTES)
    if free < needed:
        raise ConfigError(
            f"/dev/shm has {free / 2**20:,.1f} MiB free, and the data loaders of this node's {ranks} ranks keep "
            f"{needed / 2**20:,.1f} MiB there; enlarge it (docker: --shm-size), or lower --num-workers (0 needs none)"
        )


def _ended(workers: Sequence[BaseProcess], *, within: float) -> int | None:
    """Return the number of a worker that has ended, or does so within so many seconds; None when all go on."""
    deadline = time.monotonic() + within
    while True:
        for number, worker in enumerate(workers):
            if worker.exitcode is not None:
                return number
        if not workers or time.monotonic() >= deadline:
            return None
        time.sleep(0.02)
