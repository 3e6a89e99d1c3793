"""Two mends of megatron-core 0.16's selective recompute: norms without Transformer Engine, an MLP with a bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel

from megatron_let.optional import has_transformer_engine

_CORE_CHECKPOINT = tensor_parallel.checkpoint


def mended_recompute() -> list[tuple[Any, str, Any]]:
    """Return (owner, name, value) of what is to stand in megatron-core's place."""
    mended = [(tensor_parallel, "checkpoint", checkpoint)]
    if not has_transformer_engine():
        # It asks Transformer Engine whether it is in FP8, installed or not, unless told that there is no FP8.
        without_fp8 = partial(tensor_parallel.CheckpointWithoutOutput, fp8=None)
        mended.append((tensor_parallel, "CheckpointWithoutOutput", without_fp8))
    return mended


def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
    """Run `function` on `args` and recompute it in backward, as megatron-core does.

    An MLP hands its bias on to be added later. An autograd function that returns a parameter makes itself the place that
    the parameter comes from, and its backward would run into itself for ever: a view is returned in its place.
    """

    def with_views(*inputs: Any) -> Any:
        outputs = function(*inputs)
        return tuple(map(_as_result, outputs)) if isinstance(outputs, tuple) else _as_result(outputs)

    return _CORE_CHECKPOINT(with_views, distribute_saved_activations, *args)


def _as_result(value: Any) -> Any:
    return value.view_as(value) if isinstance(value, torch.nn.Parameter) else value
