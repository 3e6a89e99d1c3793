"""pretrain_let.py with a fault: `training_program.py FAULT NOTES ...flags`; the fault strikes rank 1 in iteration 3.

Each rank leaves its id in NOTES/pid_RANK, and those of its data-loader workers in NOTES/pid_RANK_N, in iteration 2.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import pretrain_let
from megatron_let.entry import RunReport, end_program, run_main

RANK = int(os.environ.get("RANK", "0"))
SECOND_SIGNAL_SECONDS = 2.0


def main(report: RunReport) -> int:
    """Train with the fault that the command line names."""
    fault, notes = sys.argv[1], Path(sys.argv[2])
    del sys.argv[1:3]
    with Faults(fault, notes):
        return pretrain_let.main(report)


class Faults:
    """The patches of one fault."""

    def __init__(self, fault: str, notes: Path) -> None:
        self.fault, self.notes = fault, notes
        self.microbatches = 0

    def __enter__(self) -> None:
        """Put them in place."""
        from megatron_let.mcore import datasets
        from megatron_let.mcore.checkpoint_writer import Content
        from megatron_let.training import forward_step, signals, trainer

        build, write, collate = forward_step.build_microbatch, Content.write, datasets._collate
        destroy = torch.distributed.destroy_process_group

        def emptied(*_: Any, **__: Any) -> None:
            if self.fault == "slow_end" and RANK == 1 and self.microbatches == 12:
                raise RuntimeError("the tap dripped")  # while the other rank waits in a collective of all

        def destroyed() -> None:
            destroy()
            if self.fault == "slow_end" and RANK == 1:
                time.sleep(2)  # the other rank has noticed, and said so, before this one comes to it

        def forward(*words: Any, **settings: Any) -> Any:
            self.at_microbatch()
            return build(*words, **settings)

        def content(share: Content) -> Any:
            self.in_save(int(share._directory.name[5:12]))
            return write(share)

        def collated(samples: Any) -> Any:
            if self.fault == "loader" and RANK == 1:
                raise RuntimeError("the tap dripped")
            return collate(samples)

        for owner, name, what in (
            (forward_step, "build_microbatch", forward),
            (Content, "write", content),
            (datasets, "_collate", collated),
            (signals, "REPEAT_SECONDS", SECOND_SIGNAL_SECONDS),
            (torch.distributed, "destroy_process_group", destroyed),
            (trainer.Trainer, "_empty_unused_memory", emptied),
        ):
            patch.object(owner, name, what).start()

    def __exit__(self, *_: object) -> None:
        """Leave them: the program ends."""

    def at_microbatch(self) -> None:
        """Four microbatches make an iteration of a rank."""
        self.microbatches += 1
        if self.microbatches == 5:
            self.leave_ids()
        if self.fault == "slow":
            time.sleep(0.05)
        if self.microbatches != 9 or RANK != 1:
            return
        if self.fault == "forward":
            raise RuntimeError("the tap dripped")
        if self.fault == "kill_loader":
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        if self.fault == "kill_rank":
            os.kill(os.getpid(), signal.SIGKILL)

    def in_save(self, iteration: int) -> None:
        """Fail in the save that is not the first, or take time in each."""
        if self.fault == "save" and RANK == 1 and iteration >= 3:
            raise RuntimeError("the tap dripped")
        if self.fault == "slow":
            if iteration >= 3:
                (self.notes / f"saving_{RANK}").touch()
            time.sleep(10_000 if os.environ.get("SAVES_LONG") else 1)

    def leave_ids(self) -> None:
        """Leave the ids of this rank and its workers."""
        (self.notes / f"pid_{RANK}").write_text(str(os.getpid()))
        for number, child in enumerate(multiprocessing.active_children()):
            (self.notes / f"pid_{RANK}_{number}").write_text(str(child.pid))


if __name__ == "__main__":
    end_program(run_main(main))
