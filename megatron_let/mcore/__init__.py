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


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Return a function as it is written, where torch.compile would wrap it."""
    return _uncompiled if function is None else function


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
