"""Rules on LET's settings."""

from __future__ import annotations

import dataclasses

from megatron_let.config.batches import train_iterations
from megatron_let.config.checks.rules import flag_of, require, require_takes_effect
from megatron_let.config.run_config import RunConfig

ALLOWED_NOW = {
    "let_loss": ("cosine",),
    "let_projection": ("interpolate",),
    "let_control": ("none",),
    "let_share_teacher": ("none",),
    "objective": ("lm",),
}
"""Settings some of whose values come with a later version -> values that work now."""


def check_let(config: RunConfig, world_size: int) -> None:
    """A teacher has a layer to guide and iterations to do it in; without one no LET flag can take effect."""
    let = config.let
    for name, allowed in ALLOWED_NOW.items():
        value = getattr(let, name)
        require(
            value in allowed,
            f"{flag_of(let, name)} {value} comes in a later version; allowed now: {', '.join(allowed)}",
        )
    if not let.is_on:
        # --let-override has a use without a teacher: to resume a LET run as a plain one.
        names = [item.name for item in dataclasses.fields(let) if item.name != "let_override"]
        require_takes_effect(let, *names, needs="--let-teacher-load")
        return
    layers, layer = config.transformer.num_layers, let.let_student_layer
    require(
        layer is None or 1 <= layer <= layers,
        f"--let-student-layer is between 1 and --num-layers {layers}, got {layer}",
    )
    _check_stop(config, world_size)


def _check_stop(config: RunConfig, world_size: int) -> None:
    """S_stop is given once and lies within the run."""
    let = config.let
    stop, fraction, iterations = (
        let.let_stop_iters,
        let.let_stop_fraction,
        train_iterations(config, world_size),
    )
    require(
        fraction is None or fraction > 0,
        f"--let-stop-fraction is above 0 and at most 1, got {fraction}; to train without a teacher leave out "
        "--let-teacher-load",
    )
    require(
        stop is None or fraction is None,
        "--let-stop-iters and --let-stop-fraction both say when the teacher goes; leave one out",
    )
    require(
        stop is None or 1 <= stop <= iterations,
        f"--let-stop-iters is between 1 and the run's {iterations} iterations, got {stop}",
    )
