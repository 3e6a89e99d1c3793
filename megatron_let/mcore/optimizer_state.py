"""An optimizer's state in checkpoints: what of megatron-core's own way has to be mended on saving and on loading."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_let.mcore.optimizer import optimizer_parts, torch_adams, use_fused_adam_on_cpu

_TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Return an optimizer's sharded state for a checkpoint; every rank calls this.

    megatron-core joins the buckets of a distributed optimizer without the padding between them, and then cuts the
    parameters out of that at their places with it: from the second bucket on every weight and moment in the checkpoint
    would be another one's.
    """
    _begin_state(optimizer, is_loading=is_loading)
    plain_get = DistributedOptimizer.get_parameter_state_dp_zero

    def get_in_place(self: Any, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state: dict[Any, Any] | None = plain_get(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers if state is not None else []):
            assert state is not None
            for tensors in state[index].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    tensors[name] = _with_padding(tensors[name], buffer)
        return state

    with patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", get_in_place):
        state: dict[str, Any] = optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=metadata
        )
    return state


def _with_padding(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Return the buckets of a buffer, joined without their padding, at their own places."""
    if len(joined) == buffer.numel:
        return joined
    padded = joined.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[start:end]
        start = end
    return padded


def load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, minding torch's Adam inside megatron-core's distributed optimizer.

    megatron-core loads everything that Adam keeps for a parameter but the step count, on whose absence it stumbles;
    and it hands one step tensor to all parameters, which Adam then counts up once for each of them: a silently wrong
    bias correction from the first iteration after a resume.
    """
    plain_set = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_with_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        own = self._get_main_param_and_optimizer_states(model_param)
        kept = {"step": own["step"]} if "step" in own else {}
        plain_set(self, model_param, {**kept, **tensors})

    _add_step_0(optimizer, state)
    with patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_with_step):
        optimizer.load_state_dict(state)
    for _, adam in torch_adams(optimizer):
        for parameter_state in adam.state.values():
            parameter_state["step"] = parameter_state["step"].clone()
    use_fused_adam_on_cpu(optimizer)


def _add_step_0(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Put the step count of a regular Adam back where megatron-core has left it out for being 0."""
    parts = optimizer_parts(optimizer)
    for index, part in enumerate(parts):
        own = state if len(parts) == 1 else state[index]
        if isinstance(part.optimizer, _TORCH_ADAMS) and not isinstance(part, DistributedOptimizer):
            own.get("optimizer", own)["state"].setdefault("common_step", torch.zeros(()))


def _begin_state(optimizer: MegatronOptimizer, *, is_loading: bool) -> None:
    """Give an optimizer that has made no step the state from which its first step would start.

    A fresh one has none, and megatron-core then saves a checkpoint without the moments that it asks for on loading, or
    stumbles: torch's Adam has no step count, SGD no maker of its momentum. fp16 makes no step while its scale falls.
    """
    for part in optimizer_parts(optimizer):
        if part.init_state_fn is None:
            part.init_state_fn = _begin_momentum
        if part.optimizer is None or part.optimizer.state:
            continue
        if isinstance(part.optimizer, _TORCH_ADAMS):
            _begin_adam(part.optimizer)
        elif not is_loading:  # then megatron-core does it
            part.init_state_fn(part.optimizer, part.config)


def _begin_adam(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _begin_momentum(sgd: torch.optim.Optimizer, _: OptimizerConfig) -> None:
    for group in sgd.param_groups:
        for parameter in group["params"] if group.get("momentum") else []:
            if "momentum_buffer" not in sgd.state[parameter]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
