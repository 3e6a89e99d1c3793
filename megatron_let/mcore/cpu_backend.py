"""Run megatron-core on CPU with gloo: what its `device="cuda"` calls mean on a machine without a GPU.

megatron-core names the CUDA device when it allocates buffers, reads RNG state or compares tensor type strings.
On CPU those calls are answered by their CPU counterparts while `cpu_backend()` is active. Never imported where a
GPU is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._device import _device_constructors

# Megatron's optimizer and gradient clipping recognise supported parameters by these strings.
CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}


# What megatron-core calls with device="cuda". Each is replaced by name: a mode that looks at every call of torch costs
# a small model a tenth of its speed.
# tests/mcore/test_cpu_backend.py holds the lists against megatron-core's source.
FACTORIES = (
    *(
        "arange",
        "as_tensor",
        "empty",
        "empty_like",
        "eye",
        "full",
        "full_like",
        "linspace",
        "ones",
        "ones_like",
    ),
    *("rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)
METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to")


def _on(target: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `function` with `target` for a `device` that is CUDA."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = target
        if target == "meta":
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return call


def _tensor_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    answer = torch._C.TensorBase.type(tensor, *args, **kwargs)
    if not isinstance(answer, str):
        return answer
    return CUDA_TYPE_NAMES.get(answer.replace("torch.meta.", "torch."), answer)


def _moved_to(target: str) -> Callable[..., torch.Tensor]:
    """Return what stands for `Tensor.cuda`."""
    move = torch.Tensor.to
    return lambda tensor, *_, **__: tensor if tensor.device.type == target else move(tensor, target)


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


@contextmanager
def cpu_backend() -> Iterator[None]:
    """Make megatron-core run on CPU inside the context; everything is put back on leaving it.

    Raises:
        RuntimeError: a GPU is present, where this module has no business.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend was entered on a machine with a GPU")
    with cuda_calls_on("cpu"):
        yield


@contextmanager
def cuda_calls_on(target: str) -> Iterator[None]:
    """Answer megatron-core's CUDA calls with device `target`, `cpu` or `meta`, and the CPU's random state."""
    import megatron.core.tensor_parallel.random as mcore_random

    # A `with torch.device(...)`, by which transformers builds models, looks once for the functions that make tensors and
    # remembers them: it must find torch's own.
    _device_constructors()
    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: torch.device(target)),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda.random, "get_rng_state", _get_rng_state),
        (torch.cuda, "set_rng_state", _set_rng_state),
        (torch.cuda.random, "set_rng_state", _set_rng_state),
        (torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
        (torch.cuda, "synchronize", _do_nothing),
        (mcore_random, "_set_cuda_rng_state", _set_rng_state),
        (torch.Tensor, "type", _tensor_type),
        (torch.Tensor, "cuda", _moved_to(target)),
        *((torch.Tensor, name, _on(target, getattr(torch.Tensor, name))) for name in METHODS),
        *((torch, name, _on(target, getattr(torch, name))) for name in FACTORIES),
    ]
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value))
        # It remarks on every dropout that the CPU's random state moved, as it must when there is no other.
        stack.enter_context(patch.object(logging.getLogger(mcore_random.__name__), "disabled", True))
        yield
