"""Does config.json describe a model no larger than the weights beside it? Asked before memory is taken for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from megatron_let.let.hf_files import Stored, config_error
from megatron_let.let.hf_model import build_empty

# A model is stored whole, or without its head. Twice that leaves room for parameters that a model makes and replaces; packed
# weights hold up to 16 of 2 bits in one number.
_ROOM, _ROOM_WHEN_PACKED = 2, 32
_MODULES_PER_TENSOR = 20
_FREE = 10_000


class _TooLarge(Exception):
    """Stops the construction of a model."""


def check_sizes(directory: Path, config: Any, stored: Stored, *, trust_remote_code: bool) -> None:
    """Build the model that `config` describes without memory behind it, and stop once it outgrows what is stored.

    Raises:
        ConfigError: it does, or it cannot be built at all.
    """
    room = _ROOM if getattr(config, "quantization_config", None) is None else _ROOM_WHEN_PACKED
    numbers, modules = room * stored.numbers + _FREE, _MODULES_PER_TENSOR * stored.tensors + _FREE
    too_large = f"has a config.json of a larger model than its weights, which hold {stored.numbers:,} numbers"
    if config.num_hidden_layers > stored.tensors:
        raise config_error(directory, f"{too_large} in {stored.tensors:,} tensors")
    try:
        with _bounded(numbers, modules):
            build_empty(config, trust_remote_code=trust_remote_code)
    except _TooLarge as error:
        raise config_error(directory, too_large) from error
    except Exception as error:  # what a model raises over sizes that make none depends on its kind
        raise config_error(directory, "cannot be loaded", error) from error


@contextmanager
def _bounded(numbers: int, modules: int) -> Iterator[None]:
    """Raise _TooLarge in the construction of a model of more parameters, counted in numbers, or more modules."""
    found = {"numbers": 0, "modules": 0}

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        found["numbers"] += 0 if parameter is None else parameter.numel()
        if found["numbers"] > numbers:
            raise _TooLarge

    def count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        found["modules"] += 1
        if found["modules"] > modules:
            raise _TooLarge

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
