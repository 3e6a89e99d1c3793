"""What a run reports and where."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoggingConfig:
    """Log line, metrics.jsonl, TensorBoard and Weights & Biases: all get the same numbers."""

    log_interval: int = 100
    """Report every so many iterations."""

    log_params_norm: bool = False
    """Report the 2-norm of all weights, those of the optimizer in fp32 where there are such."""

    log_memory_to_tensorboard: bool = False
    """Report what PyTorch holds of rank 0's GPU memory."""

    log_timers_to_tensorboard: bool = False
    """Report how long forward and backward passes and the optimizer's step take. Each waits for the GPU."""

    tensorboard_dir: str | None = None
    """Write TensorBoard events here."""

    wandb_project: str | None = None
    """Report to this Weights & Biases project."""

    wandb_exp_name: str | None = None
    """Name of the run there."""

    wandb_entity: str | None = None
    """Team or user that the project belongs to."""

    wandb_save_dir: str | None = None
    """Local directory for its files."""
