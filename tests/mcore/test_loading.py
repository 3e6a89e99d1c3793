"""A data-loader worker that is killed is named with its signal, whatever sign of it is noticed first."""

from __future__ import annotations

import os
import signal
import threading
from queue import Empty
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_let.mcore.loading import LoadedMicrobatches, LoaderError, Sample


class Numbers(Dataset[Sample]):
    """Sample n holds n; the one numbered -1 cannot be read."""

    def __getitem__(self, number: int) -> Sample:
        if number < 0:
            raise OSError("the disk is gone")
        return {"tokens": torch.tensor(number)}


def load(*numbers: int) -> tuple[LoadedMicrobatches, Any]:
    """Return a loader of two workers over given numbers, and torch's iterator behind it."""
    loader: DataLoader[Sample] = DataLoader(
        Numbers(), batch_sampler=[[number] for number in numbers], num_workers=2
    )
    microbatches = LoadedMicrobatches(loader, rank=3)
    return microbatches, microbatches._iterator


@pytest.mark.parametrize("sign", [ConnectionResetError(104, "reset"), EOFError(), Empty()])
def test_a_worker_that_dies_after_its_connection_did_is_named(
    sign: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    microbatches, iterator = load(*range(8))
    assert int(next(microbatches)["tokens"]) == 0
    worker = iterator._workers[1]
    killer = threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL))

    def get(timeout: float) -> None:
        killer.start()
        if isinstance(sign, Empty):  # torch looks at its workers then, and no later
            worker.join()
        raise sign

    monkeypatch.setattr(iterator._data_queue, "get", get)
    with pytest.raises(LoaderError, match=rf"worker 1 \(pid {worker.pid}\) of rank 3 was ended by SIGKILL"):
        list(microbatches)
    killer.join()


def test_what_is_raised_in_a_worker_that_goes_on_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_let.mcore.loading._DEATH_SECONDS", 0.1)
    microbatches, _ = load(0, -1)
    next(microbatches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(microbatches)


def test_a_dying_worker_interrupts_nothing_but_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    load(0)
    assert signal.getsignal(signal.SIGCHLD) is before
