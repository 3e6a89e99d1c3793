"""A rank joins its run: it hears signals, is watched, meets the others, and tells of a failure before it leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_let.config.run_config import RunConfig
from megatron_let.entry import RunReport
from megatron_let.mcore.parallel import ParallelContext, parallel_context
from megatron_let.training.signals import StopRequest, stop_on_signal
from megatron_let.training.watchdog import Heartbeat, Watch


@contextmanager
def joined_ranks(
    config: RunConfig, report: RunReport
) -> Iterator[tuple[ParallelContext, StopRequest, Heartbeat]]:
    """Join the ranks of a run and hold its save directory, until the end of the context.

    Raises:
        ConfigError: the ranks cannot meet, differ in their settings, or another run holds the directory.
        StalledError: a rank did not come, or fell behind.
    """
    watch = Watch(config.parallel)
    with (
        stop_on_signal(config.training, report) as stop,
        parallel_context(config, watch.over) as context,
        report.told(),
        watch.explained(),
    ):
        watch.heartbeat.stage = context.pp_rank
        report.is_held(context.on_rank_0(report.hold))
        yield context, stop, watch.heartbeat
