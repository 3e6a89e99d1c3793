"""Megatron's optimizer and learning-rate scheduler, from our settings."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest.mock import patch

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_let.config.run_config import RunConfig
from megatron_let.mcore.model import Student
from megatron_let.mcore.transformer_config import compute_dtype


def build_optimizer(config: RunConfig, student: Student) -> MegatronOptimizer:
    """Build the optimizer over this rank's chunks and tie it to the pipeline schedule (loss scale, gradient sync)."""
    core = OptimizerConfig(**{**dataclasses.asdict(config.optimizer), "params_dtype": compute_dtype(config)})
    optimizer = get_megatron_optimizer(
        core,
        student.chunks,
        config_overrides=_group_overrides(core),
        use_gloo_process_groups=False,
    )
    use_fused_adam_on_cpu(optimizer)
    student.core_config.grad_scale_func = _weakly(optimizer.scale_loss)
    student.core_config.finalize_model_grads_func = finalize_model_grads
    _tie_overlapped_communication(config, student)
    return optimizer


def _weakly(method: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that calls a method and does not keep its object alive.

    A distributed optimizer leads back to the model through autograd, where Python's garbage collector does not see it:
    held by the model's config, both would stay for ever, with their process groups.
    """
    reference = weakref.WeakMethod(method)

    def call(tensor: torch.Tensor) -> torch.Tensor:
        alive = reference()
        assert alive is not None, "the optimizer outlives the steps that it is used in"
        return alive(tensor)

    return call


def _group_overrides(core: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Return what sets some parameters apart: no weight decay, `--decoupled-lr`.

    A load tells the groups of a checkpoint apart by `is_decoupled_lr` among others, which megatron-core 0.16 always
    leaves False: the embedding would get the rates of the other matrices, or they its.
    """
    overrides = get_standard_config_overrides(config=core)
    return {
        key: cast(ParamGroupOverride, {**override, "is_decoupled_lr": True})
        if "max_lr" in override
        else override
        for key, override in overrides.items()
    }


def set_learning_rates(optimizer: MegatronOptimizer, config: RunConfig) -> None:
    """Give every parameter group the largest and smallest rate of these settings; a load brings the checkpoint's."""
    own = config.optimizer
    decoupled_min = own.min_lr if own.decoupled_min_lr is None else own.decoupled_min_lr
    for group in optimizer.param_groups:
        rates = (own.decoupled_lr, decoupled_min) if group["is_decoupled_lr"] else (own.lr, own.min_lr)
        group["max_lr"], group["min_lr"] = rates


def _tie_overlapped_communication(config: RunConfig, student: Student) -> None:
    core, chunks = student.core_config, student.chunks
    if config.ddp.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in chunks]
        core.no_sync_func = syncs[0] if len(syncs) == 1 else syncs
        if config.ddp.align_param_gather or len(chunks) > 1:
            starts = [chunk.start_grad_sync for chunk in chunks]
            core.grad_sync_func = starts[0] if len(starts) == 1 else starts
    if config.ddp.overlap_param_gather and config.ddp.align_param_gather:
        gathers = [chunk.start_param_sync for chunk in chunks]
        core.param_sync_func = gathers[0] if len(gathers) == 1 else gathers


def build_lr_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build Megatron's scheduler; it counts samples, so ramp-up and iterations mean the same schedule.

    `--lr-warmup-fraction` is a fraction of the decay length.
    """
    schedule, batch = config.schedule, config.training.global_batch_size
    if config.training.train_iters is not None:
        total = config.training.train_iters * batch
        decay = (schedule.lr_decay_iters or config.training.train_iters) * batch
        warmup: float = schedule.lr_warmup_iters * batch
        wsd = None if schedule.lr_wsd_decay_iters is None else schedule.lr_wsd_decay_iters * batch
    else:
        assert config.training.train_samples is not None, "validated: iterations or samples"
        total = config.training.train_samples
        decay = schedule.lr_decay_samples or total
        warmup = schedule.lr_warmup_samples
        wsd = schedule.lr_wsd_decay_samples
    if schedule.lr_warmup_fraction is not None:
        warmup = schedule.lr_warmup_fraction * decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_weight_decay,
        end_wd=schedule.end_weight_decay,
        wd_incr_steps=total,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=schedule.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=schedule.override_opt_param_scheduler,
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


# What decides the rates and is missing in megatron-core's own state of a scheduler.
_UNSAVED = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")


def schedule_state(scheduler: OptimizerParamScheduler) -> dict[str, Any]:
    """Return everything that a schedule is made of, by names, and its position `num_steps`."""
    return {**scheduler.state_dict(), **{name: getattr(scheduler, name) for name in _UNSAVED}}


def load_schedule(scheduler: OptimizerParamScheduler, saved: dict[str, Any]) -> None:
    """Bring a scheduler to the position of a saved one; what else it takes over depends on how it was built."""
    if scheduler.use_checkpoint_opt_param_scheduler:
        for name in _UNSAVED:
            setattr(scheduler, name, saved.get(name, getattr(scheduler, name)))
    scheduler.load_state_dict(saved)
    # megatron-core sets the weight decay before it takes over the values that this follows from
    scheduler.step(increment=0)


def learning_rate(optimizer: Any) -> float:
    """Return the learning rate of the first parameter group that follows the run's own schedule."""
    groups = optimizer.param_groups
    return float(next((group["lr"] for group in groups if group.get("default_config")), groups[0]["lr"]))


class _NormNotFiniteError(Exception):
    """Raised between the gradient's norm and the first change that a step makes."""

    def __init__(self, norm: float) -> None:
        super().__init__(f"gradient norm {norm}")
        self.norm = norm


def step_if_finite(optimizer: MegatronOptimizer) -> tuple[bool, float | None, float | None]:
    """Step, unless the norm of the reduced gradient is NaN or infinite: then weights and moments stay as they are.

    Returns what `optimizer.step` does: whether it stepped, gradient norm (None after an fp16 overflow), zeros.
    megatron-core takes the norm before anything changes, with and without `--clip-grad`, and in between there is no
    other place to stop it.
    """
    plain_norm = optimizer.get_grad_norm

    def finite_norm() -> float:
        norm = float(plain_norm())
        if not math.isfinite(norm):
            raise _NormNotFiniteError(norm)
        return norm

    try:
        with patch.object(optimizer, "get_grad_norm", finite_norm):
            is_updated, norm, num_zeros = optimizer.step()
    except _NormNotFiniteError as refusal:
        return False, refusal.norm, None
    return bool(is_updated), norm, num_zeros


def smallest_loss_scale(optimizer: MegatronOptimizer) -> float | None:
    """Return the scale below which fp16's dynamic loss scaling does not go; None where the scale is fixed."""
    for part in optimizer_parts(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if isinstance(scaler, DynamicGradScaler):
            return float(scaler.min_scale)
    return None


def use_fused_adam_on_cpu(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam update a parameter in one pass instead of a dozen.

    megatron-core builds it with the defaults, and a load brings those of the checkpoint back.
    """
    for _, adam in torch_adams(optimizer):
        for group in adam.param_groups:
            if all(parameter.device.type == "cpu" for parameter in group["params"]):
                group["fused"] = True


def torch_adams(
    optimizer: MegatronOptimizer,
) -> Iterator[tuple[MegatronOptimizer, torch.optim.Optimizer]]:
    """Yield each part of Megatron's optimizer that steps by torch's own Adam, and that Adam."""
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            yield part, part.optimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that Megatron's one is made of, itself if it is no chain of them."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
