"""A Hugging Face causal language model as a teacher: body only, frozen, from a local directory."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_let.let.teacher import Teacher


def load_hf_teacher(
    path: str | Path,
    *,
    layer: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> Teacher:
    raise NotImplementedError
