"""Everything that touches megatron-core: the only package of this project that imports it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Return a function as it is written, where torch.compile would wrap it."""
    return _uncompiled if function is None else function


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
