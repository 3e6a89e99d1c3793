"""Each rule on how ranks, layers and batches are divided, broken once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_let.config.checks.rules import Packages
from megatron_let.config.run_config import RunConfig
from megatron_let.config.validate import validate
from megatron_let.errors import ConfigError

Parse = Callable[..., RunConfig]

ALL = Packages(transformer_engine=True, apex=True)
PP2 = "--pipeline-model-parallel-size 2 --micro-batch-size 1 --global-batch-size 8"


def message_of(config: RunConfig, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size, ALL)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("words", "world_size", "expected"),
    [
        (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
            6,
            "6 ranks cannot hold whole replicas of tensor 2 x pipeline 2 x context 1 = 4 ranks; start a multiple of 4",
        ),
        (
            "--tensor-model-parallel-size 3",
            3,
            "--num-attention-heads 8 is not a multiple of --tensor-model-parallel-size 3",
        ),
        (
            "--tensor-model-parallel-size 4 --ffn-hidden-size 90",
            4,
            "--ffn-hidden-size 90 is not a multiple of",
        ),
        (
            "--num-attention-heads 12 --hidden-size 48 --group-query-attention --num-query-groups 6 "
            "--tensor-model-parallel-size 4",
            4,
            "--num-query-groups 6 is neither a multiple nor a divisor of --tensor-model-parallel-size 4",
        ),
        (
            "--tensor-model-parallel-size 4 --sequence-parallel --seq-length 30",
            4,
            "--seq-length 30 is not a multiple of --tensor-model-parallel-size 4",
        ),
        ("--cp-comm-type a2a", 1, "--cp-comm-type cannot take effect without --context-parallel-size of 2"),
        (
            "--context-parallel-size 2 --reset-attention-mask",
            2,
            "--reset-attention-mask cannot be used with --context-parallel-size 2",
        ),
        (
            "--context-parallel-size 2 --seq-length 30",
            2,
            "--seq-length 30 is not a multiple of 2 x --context",
        ),
        (
            "--context-parallel-size 2 --cp-comm-type a2a --group-query-attention --num-query-groups 1",
            2,
            "the number of key/value heads 1 is not a multiple of",
        ),
        (
            "--pipeline-model-parallel-size 3",
            3,
            "--num-layers 8 is not a multiple of --pipeline-model-parallel-size 3",
        ),
        (f"{PP2} --account-for-loss-in-pipeline-split", 2, "layers with embedding and loss counted 9 is not"),
        ("--decoder-first-pipeline-num-layers 2", 1, "without --pipeline-model-parallel-size of 2 or more"),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3",
            1,
            "whole units of --recompute-num-layers 3 layers, and the model chunks have 8; give 1, 2, 4, 8, or",
        ),
        (
            f"{PP2} --recompute-granularity full --recompute-method uniform --recompute-num-layers 8",
            2,
            "layers, and the model chunks have 4; give 1, 2, 4, or --recompute-method block",
        ),
        (
            f"{PP2} --decoder-first-pipeline-num-layers 2 --recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 4",
            2,
            "layers, and the model chunks have 2, 6; give 1, 2, or --recompute-method block",
        ),
        ("--account-for-loss-in-pipeline-split", 1, "without --pipeline-model-parallel-size of 2 or more"),
        (
            "--num-virtual-stages-per-pipeline-rank 2",
            1,
            "without --pipeline-model-parallel-size of 2 or more",
        ),
        (
            f"{PP2} --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 2",
            2,
            "8 layers less 2 and 2 named ones leave 4 for 0 pipeline stages",
        ),
        (
            "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 1",
            4,
            "leave 7 for 3 pipeline stages",
        ),
        (
            f"{PP2} --decoder-first-pipeline-num-layers 2 --account-for-loss-in-pipeline-split",
            2,
            "both say how layers are dealt",
        ),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 2",
            2,
            "say the same thing",
        ),
        (
            f"{PP2} --num-layers-per-virtual-pipeline-stage 3",
            2,
            "layers of a stage 4 is not a multiple of --num-layers-per-virtual-pipeline-stage 3",
        ),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --decoder-first-pipeline-num-layers 6 "
            "--decoder-last-pipeline-num-layers 2",
            2,
            "of two interleaved stages say the same thing; leave one out",
        ),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 3",
            2,
            "layers of a stage 4 is not a multiple of --num-virtual-stages-per-pipeline-rank 3",
        ),
        (
            f"{PP2} --decoder-first-pipeline-num-layers 3 --num-virtual-stages-per-pipeline-rank 2",
            2,
            "layers of a stage 3 is not a multiple",
        ),
        (
            f"{PP2} --decoder-first-pipeline-num-layers 2 --num-layers-per-virtual-pipeline-stage 2",
            2,
            "use --num-virtual-stages-per-pipeline-rank",
        ),
        (
            f"{PP2} --overlap-p2p-communication-warmup-flush",
            2,
            "without --num-virtual-stages-per-pipeline-rank",
        ),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 3",
            2,
            "a global batch of 3 is 3 microbatches, which do not fill groups of 2",
        ),
        (
            f"{PP2} --num-virtual-stages-per-pipeline-rank 2 "
            "--microbatch-group-size-per-virtual-pipeline-stage 1",
            2,
            "--microbatch-group-size-per-virtual-pipeline-stage is 2 (the pipeline stages) or more, got 1",
        ),
        ("--ddp-bucket-size 9", 1, "--ddp-bucket-size cannot take effect without --overlap-grad-reduce"),
        (
            "--overlap-param-gather",
            1,
            "--overlap-param-gather cannot take effect without --use-distributed-optim",
        ),
        (
            "--use-distributed-optimizer --overlap-param-gather",
            1,
            "--overlap-param-gather needs --overlap-grad-reduce",
        ),
        (
            "--bf16 --use-distributed-optimizer --ddp-reduce-scatter-with-fp32-accumulation",
            1,
            "gradients are already reduced in fp32",
        ),
        (
            "--global-batch-size 14",
            4,
            "--global-batch-size 14 is not a multiple of micro batch 2 x data-parallel size 4 = 8; use 8 or 16",
        ),
        ("--global-batch-size 4", 4, "use 8"),
    ],
)
def test_ranks_and_layers_that_do_not_divide(
    parse: Parse, words: str, world_size: int, expected: str
) -> None:
    assert expected in message_of(parse(words), world_size)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "got neither"),
        ("--train-samples 1", "--train-samples 1 is less than one global batch of 32"),
        ("--train-samples 1000 --lr-decay-iters 10", "--lr-decay-iters with --train-samples"),
        (
            "--train-samples 1000 --rampup-batch-size 4 8 100",
            "START and INCREMENT must be multiples of micro",
        ),
        ("--train-samples 1000 --rampup-batch-size 8 16 100", "does not reach --global-batch-size 32"),
        ("--train-samples 1000 --rampup-batch-size 40 8 100", "does not reach --global-batch-size 32"),
        ("--train-samples 1000 --rampup-batch-size 0 8 100", "START 1 or more"),
        (
            "--train-samples 1000 --rampup-batch-size 8 8 100 --pipeline-model-parallel-size 2 "
            "--num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 8",
            "a global batch of 8 is 1 microbatches, which do not fill groups of 2",
        ),
        (
            "--train-samples 1000 --rampup-batch-size 16 8 100 --pipeline-model-parallel-size 2 "
            "--num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 8",
            "a global batch of 24 is 3 microbatches, which do not fill groups of 2",
        ),
    ],
)
def test_runs_counted_in_samples(parse: Parse, words: str, expected: str) -> None:
    config = parse(f"{words} --global-batch-size 32", without="--train-iters 100")
    world_size = 2 if "pipeline" in words else 4
    assert expected in message_of(config, world_size)
