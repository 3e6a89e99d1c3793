"""Settings that follow from others follow Megatron-LM's rules, and what was given stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_let.config.derive import derive, resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError

Parse = Callable[..., RunConfig]


def test_widths_of_the_model(parse: Parse) -> None:
    config = parse()
    assert config.transformer.ffn_hidden_size == 256
    assert config.transformer.kv_channels == 8
    assert config.transformer.num_query_groups == 8
    assert config.model.max_position_embeddings == 32


def test_a_gated_mlp_is_two_thirds_as_wide_in_steps_of_64(parse: Parse) -> None:
    # int((4 * 2048 * 2 / 3) / 64) * 64, as LLaMA-style 1.4B models have it.
    assert parse("--swiglu --hidden-size 2048").transformer.ffn_hidden_size == 5440


def test_given_widths_stay(parse: Parse) -> None:
    config = parse("--swiglu --ffn-hidden-size 100 --kv-channels 4 --max-position-embeddings 64")
    assert config.transformer.ffn_hidden_size == 100
    assert config.transformer.kv_channels == 4
    assert config.model.max_position_embeddings == 64


def test_group_query_attention_without_a_number_has_one_group(parse: Parse) -> None:
    assert parse("--group-query-attention").transformer.num_query_groups == 1
    assert parse("--group-query-attention --num-query-groups 4").transformer.num_query_groups == 4


def test_bf16_reduces_gradients_in_fp32_unless_told_otherwise(parse: Parse) -> None:
    assert parse().ddp.grad_reduce_in_fp32 is False
    assert parse("--bf16").ddp.grad_reduce_in_fp32 is True
    assert parse("--bf16 --grad-reduce-in-bf16").ddp.grad_reduce_in_fp32 is False
    assert parse("--fp16").ddp.grad_reduce_in_fp32 is False


def test_numbers_are_checked_in_every_precision_unless_told_otherwise(parse: Parse) -> None:
    for words in ("", "--fp16", "--fp16 --loss-scale 1024"):
        assert parse(words).ddp.check_for_nan_in_grad is True
        assert parse(f"{words} --no-check-for-nan-in-loss-and-grad").ddp.check_for_nan_in_grad is False


def test_old_spellings_mean_what_replaced_them(parse: Parse) -> None:
    assert parse("--use-rotary-position-embeddings").model.position_embedding_type == "rope"
    assert parse("--recompute-activations").transformer.recompute_granularity == "selective"
    assert parse("--use-flash-attn").transformer.attention_backend.name == "flash"
    old = parse("--vocab-file v --merge-file m", without="--tokenizer-type NullTokenizer")
    assert old.tokenizer.tokenizer_type == "GPT2BPETokenizer"


def test_biases_and_softmax_that_come_with_others(parse: Parse) -> None:
    assert parse().transformer.add_qkv_bias is True
    assert parse("--disable-bias-linear").transformer.add_qkv_bias is False
    assert parse("--disable-bias-linear").model.bias_gelu_fusion is False
    assert parse().transformer.attention_softmax_in_fp32 is False
    assert parse("--apply-query-key-layer-scaling").transformer.attention_softmax_in_fp32 is True


def test_virtual_stages_follow_from_either_flag(parse: Parse) -> None:
    by_layers = parse("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2")
    assert by_layers.transformer.virtual_pipeline_model_parallel_size == 2
    by_chunks = parse("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 4")
    assert by_chunks.transformer.virtual_pipeline_model_parallel_size == 4
    assert by_chunks.ddp.align_param_gather
    one_chunk = parse("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4")
    assert one_chunk.transformer.virtual_pipeline_model_parallel_size is None
    assert not one_chunk.ddp.align_param_gather


def test_embedding_and_loss_counted_as_layers_change_the_virtual_stages(parse: Parse) -> None:
    config = parse(
        "--num-layers 6 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
    )
    assert config.transformer.virtual_pipeline_model_parallel_size == 2


def test_sequence_parallel_on_one_rank_is_turned_off_with_a_warning(
    parse: Parse, logged: pytest.LogCaptureFixture
) -> None:
    assert parse("--sequence-parallel").transformer.sequence_parallel is False
    assert "--sequence-parallel is off" in logged.text
    assert parse("--sequence-parallel --tensor-model-parallel-size 2").transformer.sequence_parallel is True


def test_the_schedule_ends_with_the_run_and_weight_decay_is_constant(parse: Parse) -> None:
    config = parse("--weight-decay 0.1")
    assert config.schedule.lr_decay_iters == 100
    assert (config.schedule.start_weight_decay, config.schedule.end_weight_decay) == (0.1, 0.1)
    by_samples = parse("--train-samples 640", without="--train-iters 100")
    assert by_samples.schedule.lr_decay_samples == 640
    assert by_samples.schedule.lr_decay_iters is None
    assert parse("--lr-decay-iters 50").schedule.lr_decay_iters == 50


def test_one_data_source_is_split_and_separate_ones_are_not(parse: Parse) -> None:
    assert parse().data.split == "969,30,1"
    assert parse("--train-data-path a", without="--mock-data").data.split is None


def test_resolve_fills_the_global_batch_of_one_microbatch_a_replica(parse: Parse) -> None:
    assert resolve(parse(), 4).training.global_batch_size == 8
    assert resolve(parse("--tensor-model-parallel-size 2"), 4).training.global_batch_size == 4
    assert resolve(parse("--global-batch-size 24"), 4).training.global_batch_size == 24


def test_resolve_validates(parse: Parse) -> None:
    with pytest.raises(ConfigError, match="global-batch-size"):
        resolve(parse("--global-batch-size 3"), 1)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--bf16 --swiglu --use-rotary-position-embeddings --disable-bias-linear --recompute-activations",
        "--fp16 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4",
        "--let-teacher-load t --let-stop-fraction 0.5",
    ],
)
def test_what_is_derived_stays_when_derived_again(parse: Parse, words: str) -> None:
    config = resolve(parse(words), 2)
    assert resolve(derive(config, warn=pytest.fail), 2) == config
