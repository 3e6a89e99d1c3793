"""Loading a saved run: what is taken back, what of the schedule may change. Saving is in `saving.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.checkpoint import SCHEDULER, Parts, load_content
from megatron_let.mcore.optimizer import load_schedule, schedule_state, set_learning_rates
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.plain_json import fits, shown
from megatron_let.training.saved_values import incomplete
from megatron_let.training.state import TrainingState


@dataclass(frozen=True)
class TokenizerRecord:
    """What a checkpoint remembers of the tokenizer."""

    vocab_size: int
    fingerprint: str | None
    encoding_fingerprint: str | None = None
    """Of the data, where their manifests say it; else the tokenizer's own."""


def load_checkpoint(
    directory: Path, run: dict[str, Any], config: RunConfig, context: ParallelContext, parts: Parts
) -> TrainingState:
    """Load weights, and unless `--finetune` and friends say otherwise optimizer, schedule and RNG; return the state."""
    options = config.checkpoint
    saved_layout = [
        run["config"]["transformer"][f"{kind}_model_parallel_size"] for kind in ("tensor", "pipeline")
    ]
    has_rng = not run["config"]["checkpoint"]["no_save_rng"]
    has_optimizer = not run["config"]["checkpoint"]["no_save_optim"]
    with_optimizer = has_optimizer and not (options.no_load_optim or options.finetune)
    with_rng = has_rng and not (options.no_load_rng or options.finetune)
    if with_rng and saved_layout != [context.tp_size, context.pp_size]:
        LOGGER.info(
            f"random states of {directory} are of another layout and not loaded (dropout will differ)"
        )
        with_rng = False
    if not has_optimizer and not (options.no_load_optim or options.finetune):
        raise ConfigError(
            f"checkpoint {directory} holds no optimizer state; give --no-load-optim or --finetune"
        )
    if with_optimizer:
        _check_same_state(config.to_dict(), run["config"], directory)
        _check_same_groups(config, run["config"], directory)
    wanted = replace(parts, optimizer=parts.optimizer if with_optimizer else None, with_rng=with_rng)
    load_content(directory, wanted, context)
    if not with_optimizer and parts.optimizer is not None:
        parts.optimizer.reload_model_params()
    if options.finetune:
        LOGGER.info(f"weights loaded from {directory}; iteration and data start at 0 (--finetune)")
        return TrainingState()
    if parts.scheduler is not None and with_optimizer:
        require_schedule(parts.scheduler, run[SCHEDULER], directory)
        restore_schedule(parts.scheduler, run[SCHEDULER], config, run["config"])
    state = TrainingState(**run["state"])
    if parts.scheduler is not None and not with_optimizer:
        parts.scheduler.step(increment=state.consumed_samples)
    LOGGER.info(f"loaded {directory} at iteration {state.iteration}")
    return state


def require_schedule(scheduler: Any, saved: Any, directory: Path) -> None:
    """Raise ConfigError unless `saved` has the names of a scheduler's state, each with a value of its kind."""
    current = schedule_state(scheduler)
    try:
        if not isinstance(saved, dict) or not scheduler.state_dict().keys() <= saved.keys() <= current.keys():
            raise ValueError(f"the schedule is {shown(saved)}")
        for name, value in saved.items():
            is_number = fits(value, int | float | None) and not isinstance(current[name], str | bool)
            if not is_number and type(value) is not type(current[name]):
                raise ValueError(f"{name} is {shown(value)}")
    except ValueError as error:
        raise incomplete(directory, error) from error


def restore_schedule(
    scheduler: Any, saved: dict[str, Any], config: RunConfig, saved_config: dict[str, Any]
) -> None:
    """Bring the learning-rate scheduler to the checkpoint's position.

    The load has brought the optimizer's parameter groups back, and with them the checkpoint's learning rates. A decay
    length that only follows from `--train-iters` keeps the checkpoint's value, so that a run can be made
    longer; `--override-opt_param-scheduler` takes all values from the command line instead.

    Raises:
        ConfigError: a value given on the command line differs from the checkpoint's.
    """
    schedule = config.schedule
    is_forced = schedule.override_opt_param_scheduler or schedule.use_checkpoint_opt_param_scheduler
    if not is_forced:
        if _decay_follows_length(config.to_dict()) and _decay_follows_length(saved_config):
            scheduler.lr_decay_steps = saved["lr_decay_steps"]
            if schedule.lr_warmup_fraction is not None:
                scheduler.lr_warmup_steps = saved["lr_warmup_steps"]
        scheduler.wd_incr_steps = saved["wd_incr_steps"]
        current = {**schedule_state(scheduler), **_decoupled_rates(config.to_dict())}
        for name, value in {**saved, **_decoupled_rates(saved_config)}.items():
            if name != "num_steps" and current[name] != value:
                raise ConfigError(
                    f"{name.replace('_', ' ')} is {current[name]} but the checkpoint was trained with {shown(value)}; give "
                    "--override-opt_param-scheduler for the new value or --use-checkpoint-opt_param-scheduler for the old"
                )
    if not schedule.use_checkpoint_opt_param_scheduler:
        set_learning_rates(scheduler.optimizer, config)
    load_schedule(scheduler, saved)


def _check_same_state(now: dict[str, Any], then: dict[str, Any], directory: Path) -> None:
    """Raise ConfigError when the checkpoint's optimizer keeps other things, or in another form, than this run's."""
    mine, saved = _form_of_state(now), _form_of_state(then)
    if mine != saved:
        raise ConfigError(
            f"checkpoint {directory} holds the optimizer state of a run with {saved}, and this run has {mine}; give the "
            "same, or --no-load-optim to begin the optimizer anew"
        )


def _form_of_state(config: dict[str, Any]) -> str:
    """Return in flags what decides over an optimizer's state; a distributed one keeps fp32 weights in any precision."""
    is_distributed = config["ddp"]["use_distributed_optimizer"]
    is_16_bit = config["transformer"]["bf16"] or config["transformer"]["fp16"]
    weights = "--use-distributed-optimizer" if is_distributed else "--bf16 or --fp16" if is_16_bit else "fp32"
    return f"--optimizer {shown(config['optimizer']['optimizer'])}, {weights}"


def _check_same_groups(config: RunConfig, saved_config: dict[str, Any], directory: Path) -> None:
    """Raise ConfigError when only one of checkpoint and run has parameter groups with a rate of their own."""
    now, then = (_decoupled_rates(values)["decoupled_lr"] for values in (config.to_dict(), saved_config))
    if (now is None) != (then is None):
        raise ConfigError(
            f"--decoupled-lr is {now} but {directory} was trained with {then}: its optimizer state is grouped otherwise; "
            "give the same or --no-load-optim"
        )


def _decoupled_rates(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config["optimizer"][name] for name in ("decoupled_lr", "decoupled_min_lr")}


def _decay_follows_length(config: dict[str, Any]) -> bool:
    """Return whether the decay length is the length of the run, i.e. was not chosen for itself."""
    schedule, training = config["schedule"], config["training"]
    if training["train_iters"] is not None:
        return bool(schedule["lr_decay_iters"] == training["train_iters"])
    return bool(schedule["lr_decay_samples"] == training["train_samples"])
