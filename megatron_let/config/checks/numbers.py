"""Required settings, smallest values and ranges."""

from __future__ import annotations

import dataclasses

from megatron_let.config.checks.rules import flag_of, require
from megatron_let.config.run_config import RunConfig

MINIMUM = {
    1: """
        num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels
        seq_length max_position_embeddings rotary_base rotary_seq_len_interpolation_factor rope_scaling_factor
        vocab_size make_vocab_size_divisible_by tensor_model_parallel_size pipeline_model_parallel_size
        context_parallel_size num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
        microbatch_group_size_per_vp_stage num_layers_per_virtual_pipeline_stage
        num_virtual_stages_per_pipeline_rank distributed_timeout_minutes bucket_size recompute_num_layers
        micro_batch_size global_batch_size train_iters train_samples exit_interval exit_duration_in_mins
        lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples eval_interval
        num_dataset_builder_threads save_interval save_retain_interval log_interval
        loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis fp8_amax_history_len
        let_student_layer let_teacher_layer let_stop_iters max_skipped_iterations
    """,
    2: "save_keep_last",  # the newest is read back before the others are deleted, and still may go bad
    0: """
        init_method_std embedding_init_method_std layernorm_epsilon lr min_lr decoupled_lr decoupled_min_lr
        weight_decay start_weight_decay end_weight_decay clip_grad adam_eps sgd_momentum
        lr_warmup_iters lr_warmup_samples lr_warmup_init manual_gc_interval eval_iters num_workers ckpt_step
        num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp8_margin seed let_weight
    """,
}
"""Smallest value -> names of fields, in whatever section they are."""

MAXIMUM = {
    # NumPy takes 32 bits, and every pipeline stage adds to the seed.
    2**31 - 1: "seed",
    # A year; torch keeps the timeout in 64 bits of a small unit.
    525_600: "distributed_timeout_minutes",
}
"""Largest value -> names of fields whose larger values would fail far from here."""

SHARES = "hidden_dropout attention_dropout lr_warmup_fraction adam_beta1 adam_beta2 rotary_percent let_stop_fraction"
"""Fields whose value is a share between 0 and 1."""


def check_required(config: RunConfig) -> None:
    """Raise ConfigError naming every setting without a default that was not given."""
    needed = [
        (config.transformer, "num_layers"),
        (config.transformer, "hidden_size"),
        (config.transformer, "num_attention_heads"),
        (config.model, "seq_length"),
        (config.training, "micro_batch_size"),
        (config.optimizer, "lr"),
        (config.tokenizer, "tokenizer_type"),
    ]
    missing = [flag_of(section, name) for section, name in needed if getattr(section, name) is None]
    require(not missing, f"not given: {', '.join(missing)}; give each on the command line or in --config")


def check_numbers(config: RunConfig) -> None:
    """Raise ConfigError for a number below its smallest or above its largest value."""
    smallest = {name: minimum for minimum, names in MINIMUM.items() for name in names.split()}
    largest = {name: maximum for maximum, names in MAXIMUM.items() for name in names.split()}
    shares = set(SHARES.split())
    for section in (getattr(config, item.name) for item in dataclasses.fields(config)):
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            if value is None:
                continue
            if item.name in smallest:
                minimum = smallest[item.name]
                allowed = f"{minimum} or more"
                require(value >= minimum, f"{flag_of(section, item.name)} is {allowed}, got {value}")
            if item.name in largest:
                maximum = largest[item.name]
                require(value <= maximum, f"{flag_of(section, item.name)} is at most {maximum}, got {value}")
            if item.name in shares:
                require(0 <= value <= 1, f"{flag_of(section, item.name)} is between 0 and 1, got {value}")
