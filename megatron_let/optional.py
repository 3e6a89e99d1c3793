"""The only place that looks for optional packages; everything else asks here once, while building."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from megatron_let.regular_files import read_text


def megatron_core_here() -> tuple[str, Path] | None:
    """Return the version ("" where it does not say) and the directory of the megatron-core that would be imported.

    Without importing it, which fails in its own ways where another version is first on the path. None: there is none.
    """
    try:
        spec = find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent
    try:
        text = read_text(directory / "package_info.py")
    except OSError:
        return "", directory
    parts = [re.search(rf"^{name} = (\d+)", text, re.MULTILINE) for name in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part[1] for part in parts if part is not None), directory


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine's PyTorch layers can be imported (extra `[gpu]`)."""
    return find_spec("transformer_engine") is not None and find_spec("transformer_engine.pytorch") is not None


def has_apex() -> bool:
    """Return whether NVIDIA apex (the one with fused kernels, not PyPI's namesake) is installed."""
    return find_spec("apex") is not None and find_spec("apex.multi_tensor_apply") is not None


def has_fused_weight_gradient() -> bool:
    """Return whether apex was built with the kernel that megatron-core adds up weight gradients with."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_tensorboard() -> bool:
    """Return whether TensorBoard's event writer can be used."""
    return find_spec("tensorboard") is not None


def has_wandb() -> bool:
    """Return whether the Weights & Biases client is installed."""
    return find_spec("wandb") is not None


def has_zstandard() -> bool:
    """Return whether zstd-compressed input can be read."""
    return find_spec("zstandard") is not None


def has_pyarrow() -> bool:
    """Return whether parquet input can be read (extra `[data]`)."""
    return find_spec("pyarrow") is not None


def has_gigatoken() -> bool:
    """Return whether the fast encoder for preprocessing is installed."""
    return find_spec("gigatoken") is not None
