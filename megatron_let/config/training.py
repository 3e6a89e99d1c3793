"""How long and with what batches to train, the learning-rate schedule, and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_let.config.setting import filled_later, option


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, length of the run, when to leave it."""

    micro_batch_size: int = filled_later()
    """Sequences in one microbatch of one model replica."""

    global_batch_size: int = filled_later()
    """Sequences in one iteration. Default: --micro-batch-size times the data-parallel size."""

    rampup_batch_size: tuple[int, int, int] | None = None
    """START INCREMENT SAMPLES: grow the global batch from START by INCREMENT over so many samples."""

    train_iters: int | None = None
    """Length of the run in iterations; either this or --train-samples."""

    train_samples: int | None = None
    """Length of the run in sequences; either this or --train-iters. A last part batch is left out."""

    exit_interval: int | None = None
    """Save and exit after an iteration that is a multiple of this number."""

    exit_duration_in_mins: int | None = None
    """Save and exit once the program has run for so many minutes."""

    exit_signal_handler: bool = False
    """Save and exit when SIGTERM or SIGUSR1 arrives."""

    max_skipped_iterations: int = 10
    """Save the last good state and stop with code 4 after so many iterations in a row with NaN or infinity."""

    seed: int = 1234
    """Seed of Python, NumPy and PyTorch."""

    manual_gc: bool = False
    """Collect Python garbage on all ranks at the same moments instead of whenever one is due."""

    manual_gc_interval: int = 0
    """With --manual-gc: collect every so many iterations; 0 only around validation."""

    manual_gc_eval: bool = option(True, off_flags=("--no-manual-gc-eval", "--disable-manual-gc-eval"))
    """With --manual-gc: collect before and after each validation; --no-manual-gc-eval: do not."""

    empty_unused_memory_level: Literal[0, 1, 2] = 0
    """Give cached GPU memory back each iteration: 0 never, 1 after it, 2 before and after."""

    recompute_activations: bool = False
    """Old spelling of --recompute-granularity selective."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate and weight decay over the run. Their values are the optimizer's --lr and so on."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay after warm-up. WSD: constant, then a decay over the last part."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last part of WSD."""

    lr_decay_iters: int | None = None
    """Iteration at which --min-lr is reached. Default: --train-iters."""

    lr_decay_samples: int | None = None
    """Sequence at which --min-lr is reached. Default: --train-samples."""

    lr_wsd_decay_iters: int | None = None
    """Length of WSD's last part in iterations."""

    lr_wsd_decay_samples: int | None = None
    """Length of WSD's last part in sequences."""

    lr_warmup_fraction: float | None = None
    """Warm-up as a share of the decay length."""

    lr_warmup_iters: int = 0
    """Warm-up in iterations."""

    lr_warmup_samples: int = 0
    """Warm-up in sequences."""

    lr_warmup_init: float = 0.0
    """Learning rate at the start of warm-up."""

    start_weight_decay: float | None = None
    """Weight decay at the first iteration, when it changes over the run."""

    end_weight_decay: float | None = None
    """Weight decay at the last iteration, when it changes over the run."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay goes from start to end."""

    override_opt_param_scheduler: bool = option(
        False, flags=("--override-opt_param-scheduler", "--override-opt-param-scheduler")
    )
    """On resume take the schedule from the command line instead of the checkpoint."""

    use_checkpoint_opt_param_scheduler: bool = option(
        False, flags=("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler")
    )
    """On resume take the schedule from the checkpoint whatever the command line says."""


@dataclass(frozen=True)
class ValidationConfig:
    """When and how long to validate."""

    eval_iters: int = 100
    """Iterations of each validation; 0 for none."""

    eval_interval: int | None = None
    """Validate every so many iterations. Default: only after the run."""

    skip_train: bool = False
    """Load, validate and exit."""
