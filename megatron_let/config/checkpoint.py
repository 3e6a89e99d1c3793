"""What is saved, when, and what a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_let.config.setting import option


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading. Layout of a directory: iter_0000100/, latest_checkpointed_iteration.txt."""

    save: str | None = None
    """Directory for checkpoints, metrics.jsonl and the resolved settings."""

    save_interval: int | None = option(None, flags=("--save-interval", "--persistent-save-interval"))
    """Save every so many iterations (and at the end)."""

    async_save: bool = False
    """Write checkpoints in the background: training stands still only while they are copied into CPU memory."""

    save_keep_last: int | None = None
    """Keep so many checkpoints, those saved last, at least 2, and the one that the run began from. Default: keep all."""

    save_retain_interval: int | None = None
    """Keep those that --save-keep-last (here 2 by default) keeps, and those at multiples of this number of iterations."""

    no_save_optim: bool = False
    """Leave the optimizer's state out."""

    no_save_rng: bool = False
    """Leave the random states out."""

    load: str | None = None
    """Directory to resume from. May be --save's: then a first start begins anew and says so."""

    ckpt_step: int | None = None
    """Load this iteration instead of the one that latest_checkpointed_iteration.txt names."""

    finetune: bool = False
    """Take only the weights, and count iterations and data from zero."""

    no_load_optim: bool = False
    """Do not load the optimizer's state."""

    no_load_rng: bool = False
    """Do not load the random states."""

    strict_load: bool = False
    """Stop when the checkpoint to go on from is damaged or missing, instead of using the last whole one before it."""

    exit_on_missing_checkpoint: bool = False
    """Stop when --load has no checkpoint, even when it is the --save directory."""

    ckpt_format: Literal["torch_dist"] = "torch_dist"
    """Checkpoint format."""
