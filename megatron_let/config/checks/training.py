"""Rules on batches, length of the run, schedules, validation and checkpoints."""

from __future__ import annotations

from megatron_let.config.batches import batch_plan, train_iterations
from megatron_let.config.checks.rules import Packages, given, require, require_takes_effect
from megatron_let.config.run_config import RunConfig


def check_batches(config: RunConfig, world_size: int) -> None:
    """Every global batch, ramp-up included, must be whole microbatches on every replica."""
    training = config.training
    plan = batch_plan(config, world_size)
    step = plan.micro_batch_size * plan.data_parallel_size
    below = plan.full // step * step
    works = f"{below} or {below + step}" if below else f"{step}"
    require(
        plan.full % step == 0,
        f"--global-batch-size {plan.full} is not a multiple of micro batch {plan.micro_batch_size} x data-parallel size "
        f"{plan.data_parallel_size} = {step}; use {works}",
    )
    if training.rampup_batch_size is None:
        return
    start, increment, samples = training.rampup_batch_size
    what = f"--rampup-batch-size {start} {increment} {samples}"
    require(
        start > 0 and increment > 0 and samples >= 0,
        f"{what} must be START 1 or more, INCREMENT 1 or more, SAMPLES 0 or more",
    )
    require(
        start % step == 0 and increment % step == 0,
        f"{what}: START and INCREMENT must be multiples of micro batch x data-parallel size = {step}",
    )
    require(
        start <= plan.full and (plan.full - start) % increment == 0,
        f"{what} does not reach --global-batch-size {plan.full} in whole increments; change one of them",
    )


def check_length(config: RunConfig) -> None:
    """The run is counted in iterations or in samples, and everything else with it."""
    training, schedule = config.training, config.schedule
    by_iterations = training.train_iters is not None
    require(
        by_iterations != (training.train_samples is not None),
        "give either --train-iters or --train-samples, " + ("got both" if by_iterations else "got neither"),
    )
    unit, other = ("iters", "samples") if by_iterations else ("samples", "iters")
    wrong = given(schedule, f"lr_decay_{other}", f"lr_warmup_{other}", f"lr_wsd_decay_{other}")
    require(
        not wrong,
        f"{', '.join(wrong)} with --train-{unit}: count the schedule in {unit} too, with the flags ending in -{unit}",
    )
    require(
        training.rampup_batch_size is None or not by_iterations,
        "--rampup-batch-size needs a run counted in samples; give --train-samples instead of --train-iters",
    )


def check_has_iterations(config: RunConfig, world_size: int) -> None:
    """A run counted in samples must have at least one iteration."""
    iterations = train_iterations(config, world_size)
    require(
        iterations >= 1,
        f"--train-samples {config.training.train_samples} is less than one global batch of "
        f"{batch_plan(config, world_size).full}; train on more samples",
    )


def check_learning_rate(config: RunConfig) -> None:
    """Learning rates, warm-up and decay."""
    optimizer, schedule = config.optimizer, config.schedule
    lr, min_lr = optimizer.lr, optimizer.min_lr
    require(min_lr <= lr, f"--min-lr {min_lr} is larger than --lr {lr}; lower it")
    require(
        schedule.lr_warmup_init <= lr,
        f"--lr-warmup-init {schedule.lr_warmup_init} is larger than --lr {lr}; lower it",
    )
    if optimizer.decoupled_lr is None:
        require_takes_effect(optimizer, "decoupled_min_lr", needs="--decoupled-lr")
    else:
        smallest = optimizer.decoupled_min_lr or 0.0
        require(
            smallest <= optimizer.decoupled_lr, "--decoupled-min-lr is larger than --decoupled-lr; lower it"
        )
    if optimizer.optimizer != "sgd":
        require_takes_effect(optimizer, "sgd_momentum", needs="--optimizer sgd")
    require(
        optimizer.optimizer == "adam" or not optimizer.use_distributed_optimizer,
        "--use-distributed-optimizer cannot be saved with --optimizer sgd: megatron-core looks for Adam's moments; leave "
        "one out",
    )
    require(
        not (schedule.override_opt_param_scheduler and schedule.use_checkpoint_opt_param_scheduler),
        "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other; leave one out",
    )
    _check_warmup(config)
    _check_wsd(config)


def _decay(config: RunConfig) -> tuple[str, int, int, int | None]:
    """Return the unit of the schedule, its decay length, its warm-up and WSD's last part."""
    training, schedule = config.training, config.schedule
    if training.train_iters is not None:
        decay = schedule.lr_decay_iters or training.train_iters
        return "iters", decay, schedule.lr_warmup_iters, schedule.lr_wsd_decay_iters
    decay = schedule.lr_decay_samples or training.train_samples or 0
    return "samples", decay, schedule.lr_warmup_samples, schedule.lr_wsd_decay_samples


def _check_warmup(config: RunConfig) -> None:
    """Warm-up is given once and ends before the decay does."""
    schedule = config.schedule
    unit, decay, warmup, _ = _decay(config)
    if schedule.lr_warmup_fraction is not None:
        require(
            warmup == 0,
            f"--lr-warmup-fraction and --lr-warmup-{unit} both say how long warm-up is; leave one out",
        )
        require(
            schedule.lr_warmup_fraction < 1,
            "--lr-warmup-fraction must be below 1: decay has to follow warm-up",
        )
    require(
        warmup < decay,
        f"--lr-warmup-{unit} {warmup} is not less than the decay length {decay}; shorten it or lengthen "
        f"--lr-decay-{unit}",
    )


def _check_wsd(config: RunConfig) -> None:
    """WSD needs to know how long its last part is."""
    schedule = config.schedule
    unit, decay, _, last_part = _decay(config)
    if schedule.lr_decay_style != "WSD":
        wsd = ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style")
        require_takes_effect(schedule, *wsd, needs="--lr-decay-style WSD")
        return
    require(
        last_part is not None,
        f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its last part",
    )
    require(
        (last_part or 0) <= decay,
        f"--lr-wsd-decay-{unit} {last_part} is longer than the decay length {decay}; shorten it",
    )


def check_weight_decay(config: RunConfig) -> None:
    """Constant weight decay is --weight-decay; a changing one has a start and an end."""
    schedule, constant = config.schedule, config.optimizer.weight_decay
    start, end = schedule.start_weight_decay, schedule.end_weight_decay
    if schedule.weight_decay_incr_style == "constant":
        require(
            start in (None, constant) and end in (None, constant),
            "--start-weight-decay and --end-weight-decay cannot take effect while --weight-decay-incr-style is "
            "constant; choose linear or cosine",
        )
        return
    require(
        start is not None and end is not None,
        f"--weight-decay-incr-style {schedule.weight_decay_incr_style} needs --start-weight-decay and --end-weight-decay",
    )
    require(
        0 <= (start or 0) <= (end or 0),
        f"--start-weight-decay {start} is larger than --end-weight-decay {end}",
    )


def check_loop(config: RunConfig) -> None:
    """Garbage collection, and when bad numbers end a run."""
    training = config.training
    if not config.ddp.check_for_nan_in_grad:
        require_takes_effect(training, "max_skipped_iterations", needs="--check-for-nan-in-loss-and-grad")
    if not training.manual_gc:
        require_takes_effect(training, "manual_gc_interval", "manual_gc_eval", needs="--manual-gc")


def check_checkpoints(config: RunConfig) -> None:
    """Flags of saving need --save, flags of loading --load."""
    checkpoint = config.checkpoint
    if checkpoint.save is None:
        saving = (
            "save_interval",
            "async_save",
            "save_keep_last",
            "save_retain_interval",
            "no_save_optim",
            "no_save_rng",
        )
        require_takes_effect(checkpoint, *saving, needs="--save")
    if checkpoint.load is None:
        loading = ("ckpt_step", "finetune", "no_load_optim", "no_load_rng", "strict_load")
        require_takes_effect(checkpoint, *loading, "exit_on_missing_checkpoint", needs="--load")
        require_takes_effect(config.data, "data_override", needs="--load")


def check_logging(config: RunConfig, packages: Packages) -> None:
    """TensorBoard and Weights & Biases need their packages, the latter's settings a project."""
    logging = config.logging
    for flag, value, package, is_installed in (
        ("--tensorboard-dir", logging.tensorboard_dir, "tensorboard", packages.tensorboard),
        ("--wandb-project", logging.wandb_project, "wandb", packages.wandb),
    ):
        require(
            value is None or is_installed,
            f"{flag} needs the package {package}, which is not installed; install it or leave the flag out",
        )
    if logging.wandb_project is None:
        require_takes_effect(
            logging, "wandb_exp_name", "wandb_entity", "wandb_save_dir", needs="--wandb-project"
        )
