"""Check the settings of a run against each other and against the number of ranks, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_let import optional
from megatron_let.config.checks import data, layout, let, model, numbers, training
from megatron_let.config.checks.rules import Packages
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError

_Rule = tuple[str, Callable[[], None], str]
"""What a rule is about, the rule, and the names of those that it builds on."""


def installed_packages() -> Packages:
    """Return which optional packages are here."""
    return Packages(
        transformer_engine=optional.has_transformer_engine(),
        apex=optional.has_apex(),
        tensorboard=optional.has_tensorboard(),
        wandb=optional.has_wandb(),
    )


def validate(config: RunConfig, world_size: int, packages: Packages | None = None) -> None:
    """Raise ConfigError for the first rule that the settings of a run on `world_size` ranks break.

    Looks at numbers alone: no file is opened, no rank asked. `packages` is what is installed, looked up when not
    given.
    """
    for problem in problems(config, world_size, packages):
        raise problem


def problems(config: RunConfig, world_size: int, packages: Packages | None = None) -> Iterator[ConfigError]:
    """Yield one error for each rule that is broken, the first first; `validate` describes the arguments.

    Order matters: later rules divide by what earlier ones have found to be there and above zero. After one that they
    build on is broken they are left out.
    """
    packages = installed_packages() if packages is None else packages
    broken: set[str] = set()
    for name, check, builds_on in _rules(config, world_size, packages):
        if broken.intersection(builds_on.split()):
            continue
        try:
            check()
        except ConfigError as problem:
            broken.add(name)
            yield problem
            if name == "numbers":
                return


def _rules(config: RunConfig, world_size: int, packages: Packages) -> list[_Rule]:
    """Return the rules in order."""
    batches = "ranks length batches"
    return [
        ("numbers", lambda: numbers.check_required(config), ""),
        ("numbers", lambda: numbers.check_numbers(config), ""),
        ("shape", lambda: model.check_shape(config), ""),
        ("positions", lambda: model.check_positions(config), ""),
        ("precision", lambda: model.check_precision(config, packages), ""),
        ("kernels", lambda: model.check_kernels(config, packages), ""),
        ("recompute", lambda: model.check_recompute(config), ""),
        ("ranks", lambda: layout.check_world_size(config, world_size), ""),
        ("tensor", lambda: layout.check_tensor_parallel(config), ""),
        ("context", lambda: layout.check_context_parallel(config), ""),
        ("pipeline", lambda: layout.check_pipeline(config), ""),
        ("units", lambda: layout.check_recompute_units(config), "recompute pipeline"),
        ("data", lambda: layout.check_data_parallel(config), ""),
        ("length", lambda: training.check_length(config), ""),
        ("batches", lambda: training.check_batches(config, world_size), "ranks"),
        ("iterations", lambda: training.check_has_iterations(config, world_size), batches),
        (
            "interleaved",
            lambda: layout.check_interleaved_microbatches(config, world_size),
            f"{batches} pipeline",
        ),
        ("rate", lambda: training.check_learning_rate(config), "length"),
        ("decay", lambda: training.check_weight_decay(config), ""),
        ("loop", lambda: training.check_loop(config), ""),
        ("checkpoints", lambda: training.check_checkpoints(config), ""),
        ("logging", lambda: training.check_logging(config, packages), ""),
        ("source", lambda: data.check_source(config), ""),
        ("tokenizer", lambda: data.check_tokenizer(config), ""),
        ("let", lambda: let.check_let(config, world_size), f"{batches} iterations"),
    ]
