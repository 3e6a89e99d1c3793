"""pretrain_let.py that, in its job's first allocation, waits in iteration 4 on every rank until that rank hears a signal.

So its time limit finds it at work, however fast the machine is. Each rank leaves NOTES/waits_RANK, then NOTES/heard_RANK
with the signal's name.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pretrain_let
from megatron_let.entry import RunReport, end_program, run_main

NOTES = Path(os.environ["NOTES"])
MICROBATCHES_BEFORE = 3 * 2  # 8 samples an iteration, 2 a microbatch, two ranks
LIMIT = 110.0  # seconds; longer than Slurm takes to look at its time limits again


def main(report: RunReport) -> int:
    """Train."""
    if "SLURM_RESTART_COUNT" in os.environ:
        return pretrain_let.main(report)
    from megatron_let.training import forward_step, signals

    build, requests, number = forward_step.build_microbatch, [], 0

    class Noted(signals.StopRequest):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            requests.append(self)

    def microbatch(*words: Any, **settings: Any) -> Any:
        nonlocal number
        number += 1
        if number == MICROBATCHES_BEFORE + 1:
            wait_for_signal(requests[0])
        return build(*words, **settings)

    with (
        patch.object(signals, "StopRequest", Noted),
        patch.object(forward_step, "build_microbatch", microbatch),
    ):
        return pretrain_let.main(report)


def wait_for_signal(request: Any) -> None:
    """Wait until this rank itself has heard one."""
    rank = os.environ["RANK"]
    (NOTES / f"waits_{rank}").touch()
    end = time.monotonic() + LIMIT
    while request.signal_name is None and time.monotonic() < end:
        time.sleep(0.02)
    (NOTES / f"heard_{rank}").write_text(str(request.signal_name))


if __name__ == "__main__":
    end_program(run_main(main))
