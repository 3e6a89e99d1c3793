"""Everything that touches megatron-core: the only package of this project that imports it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, cast
from unittest.mock import patch

import torch

from megatron_let.errors import ConfigError
from megatron_let.optional import megatron_core_here

_NEEDED = "0.16"


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Return a function as it is written, where torch.compile would wrap it."""
    return _uncompiled if function is None else function


def _require_version() -> None:
    """Raise ConfigError unless the megatron-core that would be imported is of the release this is written for."""
    found = megatron_core_here()
    if found is None:
        raise ConfigError(
            f"megatron-core {_NEEDED} is needed and none is installed; pip install megatron-core==0.16.1"
        )
    version, directory = found
    if version.split(".")[:2] != _NEEDED.split("."):
        raise ConfigError(
            f"megatron-core {_NEEDED} is needed, found {version or 'one without a version'} at {directory}; take it off "
            "PYTHONPATH, or pip install megatron-core==0.16.1"
        )


_require_version()

# Where they can be imported megatron-core takes their optimizers and norms without asking for the device; without a GPU
# (a container for GPUs on a machine that has none) those cannot run.
_FOR_GPUS = ("transformer_engine", "apex", "amp_C")
if not torch.cuda.is_available():
    for _name in _FOR_GPUS:
        sys.modules.setdefault(_name, cast(ModuleType, None))  # from here on "not installed"

# megatron-core wraps its fused functions while it is imported. None is used on a CPU, where each would have to be built
# with a C++ compiler, and loading torch's compiler for them is a third of the start-up. Its modules warn of packages that
# only GPUs need.
with (
    nullcontext() if torch.cuda.is_available() else patch.object(torch, "compile", _uncompiled),
    warnings.catch_warnings(),
):
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401
