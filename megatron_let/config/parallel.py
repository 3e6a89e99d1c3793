"""How ranks talk and how layers are laid over pipeline stages, beyond megatron-core's own fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Backend, time limits, interleaved pipeline, gradient reduction type."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers in each model chunk: turns on the interleaved pipeline schedule."""

    num_virtual_stages_per_pipeline_rank: int | None = None
    """Model chunks on each pipeline rank: the other way to turn on the interleaved schedule."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. Default: nccl with a GPU, gloo without."""

    distributed_timeout_minutes: int = 10
    """Minutes after which a stuck collective ends the run."""

    watchdog_seconds: int = 60
    """Name the rank that is behind when nothing has moved for so long, and for five usual iterations; 0: never."""

    grad_reduce_in_bf16: bool = False
    """Accumulate and reduce gradients in bf16. Without it a bf16 run uses fp32 for both."""
