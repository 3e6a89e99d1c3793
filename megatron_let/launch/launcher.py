"""Start a program on several ranks, as torchrun does, and end as its workers ended.

    python -m megatron_let.launch --nproc-per-node 8 pretrain_let.py --tensor-model-parallel-size 4 ...

Takes torchrun's own arguments (`--help` lists them); on one node a free port is found. Three things differ:

* The exit code is that of the first worker that failed, 128 + n for signal n; 0 when all ended with 0.
* What is shown last is that worker's one line (`error: ...`), or its traceback, and nothing after it.
* SIGTERM, SIGUSR1, SIGINT, SIGHUP and SIGQUIT go to the workers, which end as they see fit, and the code is theirs.
  Those still there after `--shutdown-timeout` seconds (300), or at a second Ctrl-C, are killed. (What comes within
  5 seconds of the first Ctrl-C is the same one: a terminal and a script may both deliver it.) Under `nohup` a hangup
  is ignored.

When a worker fails, the others get SIGTERM at once and SIGKILL 30 seconds later.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_let.directory_lock import lock_directory
from megatron_let.errors import EXIT_CRASH, EXIT_DONE, ConfigError
from megatron_let.exit_status import (
    LAUNCH_DIRECTORY_VARIABLE,
    FailureRecord,
    announced_save_directory,
    has_exit_status_since,
    read_records,
    reason_of,
    signal_name,
    write_exit_status,
)
from megatron_let.launch.failures import Failure, first_failure
from megatron_let.launch.signals import forwarded_signals
from megatron_let.lifetime import LAUNCHER_PID_VARIABLE
from megatron_let.limits import exceeded_limit, take_open_files
from megatron_let.signal_pipe import take_signals_back

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

DEFAULT_GRACE = 300
_ELASTIC_LOGGER = "torch.distributed.elastic.multiprocessing.api"


class _ElasticLog(logging.Handler):
    """Keeps torch's running commentary on failing workers off the screen, and notes whom it stopped itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped_pids: set[int] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the worker's id when torch says that it sends a worker a closing signal."""
        if str(record.msg).startswith("Sending process") and isinstance(record.args, tuple):
            self.stopped_pids.update(argument for argument in record.args if isinstance(argument, int))


def main(argv: Sequence[str] | None = None) -> int:
    """Launch what `argv` names (default: the command line) and return the exit code."""
    take_signals_back()
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        _check(arguments)
        take_open_files()
        with tempfile.TemporaryDirectory(prefix="megatron_let_launch_") as directory:
            os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())
            os.environ[LAUNCH_DIRECTORY_VARIABLE] = directory
            return _launch(arguments, directory)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse torchrun's arguments, with defaults that need no network for a run on one node."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "python -m megatron_let.launch"
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    arguments: argparse.Namespace = parser.parse_args(argv)
    is_one_node = arguments.nnodes in ("1", "1:1")
    is_placed = (
        arguments.rdzv_backend != "static" or arguments.rdzv_endpoint or arguments.master_port is not None
    )
    if arguments.standalone or (is_one_node and not is_placed):
        arguments.rdzv_backend, arguments.rdzv_endpoint = "c10d", "localhost:0"
        arguments.rdzv_id = f"launch_{os.getpid()}"
        arguments.local_addr = arguments.local_addr or "127.0.0.1"  # a host name need not resolve on a laptop
    if arguments.master_port is None:
        arguments.master_port = 29500  # torchrun's
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` for a script that is not there, before every rank says so on its own."""
    is_file = not (arguments.module or arguments.no_python)
    if is_file and not Path(arguments.training_script).is_file():
        raise ConfigError(f"{arguments.training_script} is not a file; give the path of the script to run")


def _launch(arguments: argparse.Namespace, directory: str) -> int:
    """Run the workers to their end and return the launcher's exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args

    if arguments.nproc_per_node != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's choice, without its page of warning
    try:
        config, command, command_arguments = config_from_args(arguments)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"torchrun's arguments: {error}") from error
    grace = DEFAULT_GRACE if arguments.shutdown_timeout is None else arguments.shutdown_timeout
    signals = [name.strip() for name in config.signals_to_handle.split(",")] + ["SIGUSR1"]
    config.signals_to_handle = ""  # ours: torch's would end the launcher and lose the workers' codes
    log = _ElasticLog()
    elastic_logger = logging.getLogger(_ELASTIC_LOGGER)
    elastic_logger.addHandler(log)
    elastic_logger.propagate = False
    with forwarded_signals(list(dict.fromkeys(signals)), grace=grace):
        started = time.time()
        try:
            elastic_launch(config=config, entrypoint=command)(*command_arguments)
        except ChildFailedError as error:
            return _report(error, directory, log.stopped_pids, started)
        except (OSError, RuntimeError) as error:
            if limit := exceeded_limit(error):
                raise ConfigError(limit) from error
            raise
    return EXIT_DONE


def _report(error: ChildFailedError, directory: str, stopped_pids: set[int], started: float) -> int:
    """Show the first failure, write the final `exit_status.json`, and return the exit code."""
    records = read_records(directory)
    failures = [
        Failure(
            rank=rank,
            exit_code=failure.exitcode,
            pid=failure.pid,
            time=float(failure.timestamp),
            was_stopped=failure.pid in stopped_pids,
            record=_record_of(records.get(rank), failure.pid),
        )
        for rank, failure in error.failures.items()
    ]
    first = first_failure(failures)
    text = first.text()
    sys.stdout.flush()
    if text:
        print(text, file=sys.stderr, flush=True)
    if text:  # without text the workers have written it themselves
        _write_status(first, text, announced_save_directory(directory), started)
    return first.shell_code() or EXIT_CRASH


def _write_status(first: Failure, text: str, announced: str | None, started: float) -> None:
    """Write `exit_status.json` where the run holds its directory, or would have, had it come so far.

    The announced directory is the run's, held by it. None is announced where rank 0 was stopped before it came to that, nor
    by a run that was refused because another holds the directory: what that one has left since is not written over.
    """
    record, lock = first.record, None
    save_directory = announced
    if announced is None and record is not None and record.save_directory is not None:
        with suppress(ConfigError):
            lock = lock_directory(record.save_directory)
        if lock is not None and not has_exit_status_since(record.save_directory, started):
            save_directory = record.save_directory
    if save_directory is None:
        return
    code = first.shell_code()
    reason = f"signal {signal_name(code - 128)}" if code > 128 else reason_of(code)
    line = text if record is None else record.message
    write_exit_status(save_directory, code, reason, line, None if record is None else record.iteration)
    if lock is not None:
        lock.release()


def _record_of(record: FailureRecord | None, pid: int) -> FailureRecord | None:
    """Return the record if this worker, or the program that it started, wrote it (not one before a restart)."""
    return record if record is not None and pid in record.pids else None
