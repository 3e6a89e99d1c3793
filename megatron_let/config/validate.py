"""Check the settings of a run against each other and against the number of ranks, before anything is built."""

from __future__ import annotations

from megatron_let import optional
from megatron_let.config.checks import data, layout, let, model, numbers, training
from megatron_let.config.checks.rules import Packages
from megatron_let.config.run_config import RunConfig


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
    given. Order matters: later rules divide by what earlier ones have found to be there and above zero.
    """
    packages = installed_packages() if packages is None else packages
    numbers.check_required(config)
    numbers.check_numbers(config)
    model.check_shape(config)
    model.check_positions(config)
    model.check_precision(config, packages)
    model.check_kernels(config, packages)
    model.check_recompute(config)
    layout.check_world_size(config, world_size)
    layout.check_tensor_parallel(config)
    layout.check_context_parallel(config)
    layout.check_pipeline(config)
    layout.check_data_parallel(config)
    training.check_length(config)
    training.check_batches(config, world_size)
    training.check_has_iterations(config, world_size)
    layout.check_interleaved_microbatches(config, world_size)
    training.check_learning_rate(config)
    training.check_weight_decay(config)
    training.check_loop(config)
    training.check_checkpoints(config)
    training.check_logging(config, packages)
    data.check_source(config)
    data.check_tokenizer(config)
    let.check_let(config, world_size)
