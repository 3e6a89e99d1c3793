"""Each rule on a run's settings, broken once: one line that says what was given, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_let.config.checks.rules import Packages
from megatron_let.config.run_config import RunConfig
from megatron_let.config.validate import validate
from megatron_let.errors import ConfigError

Parse = Callable[..., RunConfig]

ALL = Packages(transformer_engine=True, apex=True)
NONE = Packages(transformer_engine=False, apex=False)

PP2 = "--pipeline-model-parallel-size 2 --micro-batch-size 1 --global-batch-size 8"
ITERS = "--train-iters 100"


def message_of(config: RunConfig, world_size: int, packages: Packages) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size, packages)
    message = str(caught.value)
    assert "\n" not in message
    return message


GOOD = [
    ("", 1),
    ("", 3),
    ("--tensor-model-parallel-size 4 --sequence-parallel --group-query-attention --num-query-groups 2", 8),
    (f"{PP2} --num-layers-per-virtual-pipeline-stage 2", 2),
    (f"{PP2} --num-virtual-stages-per-pipeline-rank 4", 4),
    (f"{PP2} --decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 6", 2),
    ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2 --global-batch-size 4", 4),
    ("--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
    ("--fp16 --initial-loss-scale 65536 --hysteresis 1", 1),
    ("--recompute-granularity full --recompute-method block --recompute-num-layers 1", 1),
    ("--recompute-granularity selective --recompute-modules core_attn mlp", 1),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 10 --lr-warmup-iters 5", 1),
    (
        "--lr-warmup-fraction 0.1 --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1",
        1,
    ),
    ("--save out --save-interval 10 --load out --strict-load", 1),
    ("--let-teacher-load t --let-stop-iters 100 --let-student-layer 8 --let-weight 0", 1),
    ("--let-teacher-load t --let-stop-fraction 1", 1),
    ("--let-override", 1),
    ("--position-embedding-type rope --rotary-percent 0.5 --rotary-base 500000 --use-rope-scaling", 1),
    ("--split 99,1,0", 1),
    ("--split '99,1,0'", 1),
    ("--eval-iters 0 --eval-interval 10 --num-workers 0", 1),
]


@pytest.mark.parametrize(("words", "world_size"), GOOD)
def test_a_run_that_keeps_the_rules_passes(parse: Parse, words: str, world_size: int) -> None:
    validate(parse(words), world_size, NONE)


def test_a_run_counted_in_samples_with_ramp_up_passes(parse: Parse) -> None:
    words = "--train-samples 1000 --global-batch-size 32 --rampup-batch-size 8 8 100 --lr-warmup-samples 50"
    validate(parse(words, without=ITERS), 4, NONE)


def test_all_missing_settings_are_named_at_once(parse: Parse) -> None:
    message = message_of(parse(without="--num-layers 8,--lr 1e-3,--seq-length 32"), 1, NONE)
    assert "not given: --num-layers, --seq-length, --lr;" in message


def test_without_saying_which_packages_there_are_they_are_looked_for(
    parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_let.optional.has_transformer_engine", lambda: False)
    with pytest.raises(ConfigError, match="needs Transformer Engine"):
        validate(parse("--fp8-format hybrid"), 1)
    monkeypatch.setattr("megatron_let.optional.has_transformer_engine", lambda: True)
    validate(parse("--fp8-format hybrid"), 1)


BROKEN_NUMBERS = [
    ("--num-layers 0", "--num-layers is 1 or more, got 0"),
    ("--norm-epsilon -1", "--norm-epsilon is 0 or more"),
    ("--lr -1", "--lr is 0 or more"),
    ("--micro-batch-size 0", "--micro-batch-size is 1 or more"),
    ("--log-interval 0", "--log-interval is 1 or more"),
    ("--train-iters 0", "--train-iters is 1 or more"),
    ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size is 1 or more"),
    (
        "--pipeline-model-parallel-size 0 --num-layers-per-virtual-pipeline-stage 1",
        "--pipeline-model-parallel-size is 1 or more",
    ),
    ("--num-attention-heads 0", "--num-attention-heads is 1 or more"),
    ("--eval-iters -1", "--eval-iters is 0 or more"),
    ("--let-teacher-load t --let-weight -0.1", "--let-weight is 0 or more"),
    ("--hidden-dropout 1.5", "--hidden-dropout is between 0 and 1, got 1.5"),
    ("--adam-beta2 1.1", "--adam-beta2 is between 0 and 1"),
]

BROKEN_MODEL = [
    ("--hidden-size 60", "--hidden-size 60 is not a multiple of --num-attention-heads 8; change one"),
    ("--num-query-groups 4", "cannot take effect without --group-query-attention"),
    ("--group-query-attention --num-query-groups 3", "--num-attention-heads 8 is not a multiple of"),
    ("--swiglu --squared-relu", "--swiglu and --squared-relu are two activations"),
    ("--max-position-embeddings 16", "--seq-length 32 is longer than --max-position-embeddings 16"),
    ("--no-position-embedding", "--no-position-embedding goes with rope only"),
    ("--rope-scaling-factor 4", "without --use-rope-scaling"),
    ("--rotary-percent 0.5", "--rotary-percent cannot take effect without --position-embedding-type rope"),
    ("--rotary-interleaved", "--rotary-interleaved cannot take effect without"),
    ("--position-embedding-type rope --rotary-percent 0.4", "gives 3; choose an even number"),
    ("--bias-swiglu-fusion", "--bias-swiglu-fusion cannot take effect without --swiglu"),
    ("--bias-gelu-fusion --swiglu", "--bias-gelu-fusion needs GELU and a bias"),
    ("--bias-gelu-fusion --disable-bias-linear", "--bias-gelu-fusion needs GELU and a bias"),
    ("--rope-fusion", "--rope-fusion cannot take effect without"),
    ("--use-flash-attn --attention-backend fused", "contradicts --attention-backend fused"),
    ("--cross-entropy-fusion-impl te", "cannot take effect without --cross-entropy-loss-fusion"),
    ("--deterministic-mode --cross-entropy-loss-fusion", "--deterministic-mode excludes"),
]

BROKEN_PRECISION = [
    ("--fp16 --bf16", "--fp16 and --bf16 exclude each other"),
    ("--fp32-residual-connection", "--fp32-residual-connection cannot take effect without --bf16 or --fp16"),
    ("--grad-reduce-in-bf16", "--grad-reduce-in-bf16 cannot take effect without --bf16"),
    ("--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32", "exclude each other"),
    ("--bf16 --loss-scale 1024", "--loss-scale cannot take effect without --fp16"),
    ("--fp16 --loss-scale 1024 --hysteresis 4", "--loss-scale is fixed, so --hysteresis"),
    ("--fp8-param-gather", "--fp8-param-gather cannot take effect without --fp8-format"),
    ("--fp8-amax-history-len 8", "cannot take effect without --fp8-format"),
    ("--fp8-format hybrid --num-layers-at-start-in-bf16 2", "without --first-last-layers-bf16"),
    ("--fp8-format hybrid --fp8-param-gather", "--fp8-param-gather needs --use-distributed-optimizer"),
    (
        "--fp8-format hybrid --fp8-param-gather --use-distributed-optimizer --reuse-grad-buf-for-mxfp8-param-ag",
        "needs --fp8-param-gather and --fp8-recipe mxfp8",
    ),
    ("--fp8-format hybrid --transformer-impl local", "but --transformer-impl is local"),
]

BROKEN_RECOMPUTE = [
    ("--recompute-granularity full", "needs --recompute-method {uniform,block} and --recompute-num-layers"),
    ("--recompute-granularity full --recompute-method uniform", "--recompute-num-layers"),
    ("--recompute-activations --recompute-granularity full", "--recompute-activations means selective"),
    ("--recompute-granularity selective --recompute-num-layers 1", "without --recompute-granularity full"),
    ("--recompute-modules mlp", "without --recompute-granularity selective"),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1 --recompute-modules mlp",
        "--recompute-modules goes with selective",
    ),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 1 "
        "--distribute-saved-activations",
        "--distribute-saved-activations needs --tensor-model-parallel-size of 2",
    ),
]

BROKEN_SCHEDULE = [
    ("--train-samples 100", "give either --train-iters or --train-samples, got both"),
    ("--lr-decay-samples 100", "--lr-decay-samples with --train-iters: count the schedule in iters too"),
    ("--lr-warmup-samples 100", "--lr-warmup-samples with --train-iters"),
    (
        "--rampup-batch-size 2 2 100 --global-batch-size 8",
        "--rampup-batch-size needs a run counted in samples",
    ),
    ("--min-lr 1", "--min-lr 1.0 is larger than --lr 0.001"),
    ("--lr-warmup-init 1", "--lr-warmup-init 1.0 is larger than --lr"),
    ("--decoupled-min-lr 1e-5", "--decoupled-min-lr cannot take effect without --decoupled-lr"),
    ("--decoupled-lr 1e-5 --decoupled-min-lr 1e-4", "--decoupled-min-lr is larger than --decoupled-lr"),
    (
        "--optimizer sgd --use-distributed-optimizer",
        "--use-distributed-optimizer cannot be saved with --optimizer sgd",
    ),
    ("--sgd-momentum 0.5", "--sgd-momentum cannot take effect without --optimizer sgd"),
    (
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt_param-scheduler exclude each other",
    ),
    ("--lr-warmup-fraction 0.1 --lr-warmup-iters 10", "both say how long warm-up is"),
    ("--lr-warmup-fraction 1", "--lr-warmup-fraction must be below 1"),
    ("--lr-warmup-iters 100", "--lr-warmup-iters 100 is not less than the decay length 100"),
    ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    ("--lr-wsd-decay-iters 10", "--lr-wsd-decay-iters cannot take effect without --lr-decay-style WSD"),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 200", "is longer than the decay length 100"),
    ("--start-weight-decay 0.5", "while --weight-decay-incr-style is constant"),
    (
        "--weight-decay-incr-style cosine --start-weight-decay 0.1",
        "needs --start-weight-decay and --end-weight",
    ),
    (
        "--weight-decay-incr-style cosine --start-weight-decay 0.1 --end-weight-decay 0.05",
        "is larger than --end-weight-decay",
    ),
    ("--manual-gc-interval 10", "--manual-gc-interval cannot take effect without --manual-gc"),
]

BROKEN_FILES = [
    ("--save-interval 10", "--save-interval cannot take effect without --save"),
    ("--no-save-optim", "--no-save-optim cannot take effect without --save"),
    ("--finetune", "--finetune cannot take effect without --load"),
    ("--ckpt-step 10 --strict-load", "--ckpt-step, --strict-load cannot take effect without --load"),
    ("--wandb-exp-name a", "--wandb-exp-name cannot take effect without --wandb-project"),
    ("--data-path a", "give one source of data"),
    ("--train-data-path a", "got --mock-data and --train-data-path"),
    ("--split 90;5;5", "--split is up to three shares"),
    ("--split 0,1,0", "--split is up to three shares"),
    ("--split 1,1,1,1", "--split is up to three shares"),
    (
        "--tokenizer-model m",
        "--tokenizer-model cannot take effect without a --tokenizer-type other than Null",
    ),
    (
        "--tokenizer-type HuggingFaceTokenizer",
        "--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model",
    ),
    ("--tokenizer-type GPT2BPETokenizer --vocab-file v", "GPT2BPETokenizer needs --merge-file"),
    ("--tokenizer-type Llama2Tokenizer", "Llama2Tokenizer needs --tokenizer-model"),
]

BROKEN_LET = [
    ("--let-weight 0.3", "--let-weight cannot take effect without --let-teacher-load"),
    ("--let-stop-iters 5 --let-student-layer 1", "--let-student-layer, --let-stop-iters cannot take effect"),
    ("--let-teacher-load t --let-student-layer 0", "--let-student-layer is 1 or more, got 0"),
    (
        "--let-teacher-load t --let-student-layer 9",
        "--let-student-layer is between 1 and --num-layers 8, got 9",
    ),
    ("--let-teacher-load t --let-stop-iters 0", "--let-stop-iters is 1 or more"),
    ("--let-teacher-load t --let-stop-iters 101", "between 1 and the run's 100 iterations, got 101"),
    ("--let-teacher-load t --let-stop-fraction 0", "--let-stop-fraction is above 0 and at most 1"),
    ("--let-teacher-load t --let-stop-fraction 1.1", "--let-stop-fraction is between 0 and 1"),
    ("--let-teacher-load t --let-stop-fraction 0.5 --let-stop-iters 50", "both say when the teacher goes"),
    ("--let-control random-teacher", "comes in a later version; allowed now: none"),
    ("--let-teacher-load t --let-loss cca", "--let-loss cca comes in a later version; allowed now: cosine"),
    ("--let-projection linear", "allowed now: interpolate"),
    ("--let-share-teacher tensor", "allowed now: none"),
    ("--objective salt", "--objective salt comes in a later version; allowed now: lm"),
]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        *BROKEN_NUMBERS,
        *BROKEN_MODEL,
        *BROKEN_PRECISION,
        *BROKEN_RECOMPUTE,
        *BROKEN_SCHEDULE,
        *BROKEN_FILES,
        *BROKEN_LET,
    ],
)
def test_settings_that_contradict(parse: Parse, words: str, expected: str) -> None:
    assert expected in message_of(parse(words), 1, ALL)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "got none"),
        ("--data-path 0.3 a 0.7", "--data-path is one or more prefixes, or WEIGHT PREFIX"),
        ("--data-path a 0.3 b 0.7", "--data-path is one or more prefixes, or WEIGHT PREFIX"),
        ("--data-path -1 a 2 b", "needs weights above 0"),
        ("--valid-data-path a", "--valid-data-path without --train-data-path"),
        ("--train-data-path a --split 90,5,5", "--split cannot take effect with one path for each split"),
    ],
)
def test_data_sources(parse: Parse, words: str, expected: str) -> None:
    assert expected in message_of(parse(words, without="--mock-data"), 1, ALL)


@pytest.mark.parametrize(
    "words", ["--data-path a", "--data-path a b", "--data-path 1 a 2 b", "--train-data-path a"]
)
def test_data_sources_that_are_right(parse: Parse, words: str) -> None:
    validate(parse(words, without="--mock-data"), 1, NONE)


def test_a_null_tokenizer_needs_a_vocabulary_size(parse: Parse) -> None:
    assert "NullTokenizer needs --vocab-size" in message_of(parse(without="--vocab-size 100"), 1, ALL)


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ("--fp8-format hybrid", 1),
        ("--context-parallel-size 2", 2),
        ("--transformer-impl transformer_engine", 1),
        ("--attention-backend flash", 1),
        ("--attention-backend fused", 1),
        ("--use-flash-attn", 1),
        ("--cross-entropy-loss-fusion --cross-entropy-fusion-impl te", 1),
        ("--masked-softmax-fusion", 1),
        ("--gradient-accumulation-fusion", 1),
        ("--position-embedding-type rope --rope-fusion", 1),
        ("--persist-layer-norm", 1),
    ],
)
def test_what_needs_an_absent_package_is_an_error_and_passes_with_it(
    parse: Parse, words: str, world_size: int
) -> None:
    assert "not installed" in message_of(
        parse(words), world_size, NONE
    ) or "neither is installed" in message_of(parse(words), world_size, NONE)
    validate(parse(words), world_size, ALL)
