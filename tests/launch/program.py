"""A small program that the launcher's tests start: it ends in the way its first argument names."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_let.entry import RunReport, end_program, run_main
from megatron_let.errors import ConfigError
from megatron_let.signal_pipe import heard_signals

RANK = int(os.environ["RANK"])
CODE_AFTER_SIGTERM = 5


def main(report: RunReport) -> int:
    """End as asked; ranks with no part in it wait for longer than any test."""
    ending, directory = sys.argv[1], Path(sys.argv[2])
    if ending == "rank_1_misconfigured_first" and RANK == 0:  # it has come nowhere yet
        time.sleep(10_000)
    report.saves_to(directory)
    report.iteration = 3
    Path(directory, f"pid_{RANK}").write_text(str(os.getpid()))
    if ending == "well":
        return all_reduce_and_print()
    if ending == "all_misconfigured" or (ending.startswith("rank_1_misconfigured") and RANK == 1):
        raise ConfigError(f"3 is given,\nonly 1, 2 and 4 are allowed ({RANK})")
    if ending == "rank_1_raises" and RANK == 1:
        raise RuntimeError("the tap dripped")
    if ending == "rank_1_killed" and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "plain_code" and RANK == 1:
        os._exit(7)
    if ending == "saves_on_sigterm":
        return save_on_sigterm(directory)
    if ending == "with_children":
        fork_a_child(directory)
    if ending == "says_second_signal":
        return wait_for_second_signal(report, directory)
    if ending == "ignores_sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(directory, f"ready_{RANK}").touch()
    time.sleep(10_000)
    return 0


def all_reduce_and_print() -> int:
    """Make a process group from the environment and say what came of it."""
    import torch

    torch.distributed.init_process_group("gloo")
    value = torch.ones(1)
    torch.distributed.all_reduce(value)
    torch.distributed.destroy_process_group()
    sys.stdout.write(f"sum {value.item():.0f}\n")  # one write, so that the ranks' lines do not mix
    return 0


def fork_a_child(directory: Path) -> None:
    """Fork a program, as a data loader does, that would wait for longer than any test and heeds no SIGTERM."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(10_000)
        os._exit(0)
    Path(directory, f"pid_{RANK}_child").write_text(str(child))


def wait_for_second_signal(report: RunReport, directory: Path) -> int:
    """End at once at the second SIGTERM, whatever the main thread does."""
    received: list[float] = []

    def hear(number: int, now: float) -> None:
        received.append(now)
        Path(directory, f"heard_{RANK}_{len(received)}").touch()
        if len(received) == 2:
            report.end_at_once(128 + number, f"error: a second one ({RANK})")

    with heard_signals([signal.SIGTERM], hear):
        Path(directory, f"ready_{RANK}").touch()
        time.sleep(10_000)
    return 0


def save_on_sigterm(directory: Path) -> int:
    """Wait for SIGTERM or SIGUSR1, then take a while to save, whatever signals come meanwhile."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    Path(directory, f"ready_{RANK}").touch()
    while not received:
        time.sleep(0.02)
    Path(directory, f"saving_{RANK}").touch()
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.02)
    Path(directory, f"saved_{RANK}").write_text(str(len(received)))
    return CODE_AFTER_SIGTERM


if __name__ == "__main__":
    end_program(run_main(main))
