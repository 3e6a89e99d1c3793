"""The one assembly line: from settings to a trainer that is ready to go.

Everything that can be wrong with what the user gave is found here, before the first iteration, and the cheap checks
come before the expensive parts are built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_let.config.batches import batch_plan, padded_vocab_size
from megatron_let.config.run_config import RunConfig
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.log import LOGGER
from megatron_let.mcore.checkpoint import Parts
from megatron_let.mcore.datasets import DataSplits, SampleCounts, build_datasets
from megatron_let.mcore.kernel_checks import check_kernels
from megatron_let.mcore.model import build_student
from megatron_let.mcore.optimizer import build_lr_scheduler, build_optimizer
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.training.alignment import build_alignment
from megatron_let.training.checkpoint_choice import check_same_model, choose_checkpoint, read_run
from megatron_let.training.checkpoints import load_checkpoint
from megatron_let.training.data_checks import check_data, record_of_tokenizer
from megatron_let.training.data_needs import build_run_tokenizer, sample_counts, total_iterations
from megatron_let.training.data_record import (
    DataRecord,
    check_same_data,
    check_same_order,
    record_of_data,
    with_order,
)
from megatron_let.training.forward_step import ForwardStep
from megatron_let.training.let_record import record_of_run
from megatron_let.training.node_agreement import check_nodes, check_order_on_nodes
from megatron_let.training.report import build_reporter
from megatron_let.training.resolved import resolved_choices
from megatron_let.training.save_directory import check_save_directory
from megatron_let.training.saving import RunRecord, build_saver
from megatron_let.training.signals import StopRequest
from megatron_let.training.split_checks import usable_counts
from megatron_let.training.state import TrainingState
from megatron_let.training.trainer import Run, Trainer
from megatron_let.training.watchdog import Heartbeat


def build_trainer(
    config: RunConfig, context: ParallelContext, stop: StopRequest, heartbeat: Heartbeat | None = None
) -> Trainer:
    """Build student, data, teacher and loop for this rank, loading the checkpoint if there is one.

    Raises:
        ConfigError: what was given cannot work; every rank raises it.
    """
    LOGGER.info(config.to_yaml())
    check_kernels(config, is_on_gpu=context.is_on_gpu)
    check_save_directory(config, context)
    tokenizer = context.together(lambda: build_run_tokenizer(config))
    remembered = record_of_tokenizer(config, tokenizer, context)
    directory = choose_checkpoint(config, context)
    saved = None if directory is None else read_run(directory, context)
    if directory is not None and saved is not None:
        check_same_model(config, remembered, saved, directory)
    start = _start(config, saved)
    end = total_iterations(config, context.world_size, start)
    let_record = context.together(lambda: record_of_run(config, saved, end))
    is_guided = let_record is not None and let_record.schedule().is_active_at(start.iteration)
    needs_teacher = is_guided and not config.validation.skip_train
    check_data(config, tokenizer, context, needs_teacher=needs_teacher)
    guide = let_record if needs_teacher else None
    check_nodes(config, context, tokenizer, guide, directory)
    data, data_record = _open_data(
        config, context, tokenizer, sample_counts(config, end, start), saved=saved, directory=directory
    )
    parts, padded = _build_parts(config, context, tokenizer.vocab_size)
    state = TrainingState()
    if directory is not None and saved is not None:
        state = load_checkpoint(directory, saved, config, context, parts)
    alignment = None if guide is None else build_alignment(config, context, parts.student, guide)
    choices = resolved_choices(config, context, parts.student, let_record)
    LOGGER.info(" | ".join(choices))
    record = RunRecord(let_record, data_record, choices, remembered)
    saver = build_saver(config, context, parts, record, started_from=state.iteration)
    run = Run(
        config=config,
        context=context,
        parts=parts,
        data=data,
        forward_step=ForwardStep(config, context, tokenizer.eod, alignment, heartbeat or Heartbeat()),
        alignment=alignment,
        saver=saver,
        reporter=build_reporter(
            config, context, padded_vocab_size=padded, resumed_iteration=state.iteration, total_iterations=end
        ),
        batches=batch_plan(config, context.world_size),
        total_iterations=end,
    )
    return Trainer(run, state, stop)


def _open_data(
    config: RunConfig,
    context: ParallelContext,
    tokenizer: Tokenizer,
    counts: SampleCounts,
    *,
    saved: dict[str, Any] | None,
    directory: Path | None,
) -> tuple[DataSplits, DataRecord]:
    """Build the data sets, held against those of the other nodes and of the checkpoint; also return their record."""
    record = record_of_data(config, context)
    context.together(lambda: check_same_data(config, record, saved, directory))
    data = build_datasets(config, tokenizer, usable_counts(config, counts, context), context)
    record = with_order(record, data)
    check_order_on_nodes(context, record)
    context.together(lambda: check_same_order(config, data, saved, directory))
    return data, record


def _build_parts(config: RunConfig, context: ParallelContext, vocab_size: int) -> tuple[Parts, int]:
    """Return student, optimizer and schedule, and the padded size of the vocabulary."""
    divisor = config.model.make_vocab_size_divisible_by
    padded = padded_vocab_size(vocab_size, divisor, context.tp_size)
    student = build_student(config, context, vocab_size=vocab_size, padded_vocab_size=padded)
    optimizer = build_optimizer(config, student)
    return Parts(student, optimizer, build_lr_scheduler(config, optimizer), with_rng=True), padded


def _start(config: RunConfig, saved: dict[str, Any] | None) -> TrainingState:
    """Return where the run goes on."""
    is_new = saved is None or config.checkpoint.finetune
    return TrainingState() if saved is None or is_new else TrainingState(**saved["state"])
