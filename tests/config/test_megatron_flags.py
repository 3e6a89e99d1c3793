"""Every flag of Megatron-LM is a setting here, accepted without effect, or refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_let.config.checks.rules import Packages
from megatron_let.config.megatron_flags import REFUSED, WITHOUT_EFFECT
from megatron_let.config.old_flags import _INSTEAD
from megatron_let.config.run_config import all_settings
from megatron_let.config.validate import validate
from megatron_let.errors import ConfigError, ProblemsError
from megatron_let.mcore.settings import CORE_SECTIONS
from megatron_let.training.arguments import parse_arguments, settings_of_run

MEGATRON_FLAGS = (Path(__file__).parent / "megatron_flag_names.txt").read_text().split()
"""Every flag that Megatron-LM core_v0.16.1's own parser knows, with those of its optional quantisation package."""


def placed() -> Counter[str]:
    ours = [flag for setting in all_settings(CORE_SECTIONS) for flag in setting.flags]
    foreign = [flag for family in (*WITHOUT_EFFECT, *REFUSED) for flag in family.entries()]
    return Counter(ours + foreign)


def test_every_flag_of_megatron_is_in_exactly_one_place() -> None:
    assert len(MEGATRON_FLAGS) > 600
    counts = placed()
    assert [flag for flag in MEGATRON_FLAGS if flag not in counts] == []
    assert [flag for flag, count in counts.items() if count > 1] == []


def test_the_tables_of_foreign_flags_name_no_flag_that_megatron_does_not_have() -> None:
    own_plans = {"--kd-weight", "--kd-temperature", "--kd-stop-iters"}
    foreign = {flag for family in (*WITHOUT_EFFECT, *REFUSED) for flag in family.entries()}
    assert foreign - set(MEGATRON_FLAGS) == own_plans


def test_a_flag_without_effect_is_warned_about_once(logged: pytest.LogCaptureFixture) -> None:
    config = parse_arguments(["--profile", "--profile-step-start", "4", "--profile", "--seed", "9"])
    assert [record.message for record in logged.records] == [
        "--profile has no effect: no profiler is started",
        "--profile-step-start has no effect: no profiler is started",
    ]
    assert config.training.seed == 9


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num-experts 8", "--num-experts is not supported: mixture of experts"),
        ("--expert-model-parallel-size 2", "mixture of experts is not supported"),
        ("--multi-latent-attention", "use --group-query-attention"),
        ("--mtp-num-layers 1", "multi-token prediction"),
        ("--fp4-format e2m1", "FP8 recipes"),
        ("--use-legacy-models", "only GPT models of megatron-core"),
        ("--heterogeneous-layers-config-path x", "only GPT models"),
        ("--use-checkpoint-args", "a checkpoint only checks them"),
        ("--batch-size 4", "use --micro-batch-size"),
        ("--vision-pretraining", "only GPT pretraining"),
        ("--window-size 128,0", "only causal softmax attention"),
        ("--softmax-type learnable", "only causal softmax attention"),
        ("--use-mcore-models 4", "--use-mcore-models is a switch and takes no value, got 4"),
        ("--kd-weight 0.5", "comes in a later version"),
        ("--rope-type", "is not supported"),
        ("--dist-ckpt-format zarr", "checkpoints are torch_dist directories"),
        (
            "--activations-checkpoint-method uniform",
            "use --recompute-granularity full --recompute-method uniform",
        ),
        ("--layernorm-epsilon 1e-6", "a flag of an earlier Megatron-LM; use --norm-epsilon"),
        ("--DDP-impl local", "has no effect any more; leave it out"),
    ],
)
def test_a_flag_that_would_change_the_result_is_refused_with_what_to_do(words: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(words.split())
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "--expert-model-parallel-size 1",
        "--softmax-type=vanilla",
        "--dataloader-type single",
        "--rope-type rope",
        "--dist-ckpt-format torch_dist",
    ],
)
def test_a_refused_flag_passes_with_the_value_that_is_used_anyway(
    words: str, logged: pytest.LogCaptureFixture
) -> None:
    assert parse_arguments(words.split()) == parse_arguments([])
    assert not logged.records


def test_a_name_that_is_not_near_is_not_suggested() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--export-te-mcore-model"])
    assert str(caught.value) == "unknown flag --export-te-mcore-model"


def test_old_flags_are_none_of_todays() -> None:
    old = {flag for flags in _INSTEAD.values() for flag in flags.split()}
    assert old.isdisjoint(MEGATRON_FLAGS)
    advised = {word for advice in _INSTEAD for word in advice.split() if word.startswith("--")}
    assert advised <= {flag for setting in all_settings(CORE_SECTIONS) for flag in setting.spellings}


# What the command lines of Megatron-LM's own tests of GPT pretraining share, beyond the settings here.
PUBLISHED = """
    --num-layers 12 --hidden-size 512 --num-attention-heads 8 --log-params-norm --log-num-zeros-in-grad
    --log-validation-ppl-to-tensorboard --log-timers-to-tensorboard --tensorboard-dir tb --micro-batch-size 4
    --global-batch-size 32 --seq-length 1024 --max-position-embeddings 1024 --train-iters 100 --timing-log-level 0
    --lr-decay-iters 320000 --save checkpoints --load checkpoints --data-path my-gpt3_00_text_document
    --vocab-file vocab.json --merge-file merges.txt --split 949,50,1 --distributed-backend nccl --lr 0.00015
    --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01
    --log-interval 1 --save-interval 50 --eval-interval 1000 --eval-iters 10 --transformer-impl transformer_engine
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --overlap-param-gather-with-optimizer-step --sequence-parallel
    --no-gradient-accumulation-fusion --attention-softmax-in-fp32 --use-mcore-models --ckpt-format torch_dist
    --dist-ckpt-strictness log_all --data-cache-path cache --bf16 --attention-backend unfused --log-memory-to-tensorboard
    --recompute-num-layers 1 --expert-tensor-parallel-size 4 --moe-token-dispatcher-type alltoall --use-tp-pp-dp-mapping
    --no-ckpt-fully-parallel-save --rerun-mode validate_results --num-virtual-stages-per-pipeline-rank 2
    --check-weight-hash-across-dp-replicas-interval 10 --disable-gloo-process-groups --cross-entropy-fusion-impl native
    --cross-entropy-loss-fusion --tp-comm-overlap --use-persistent-ckpt-worker --ckpt-assume-constant-structure
    --wgrad-deferral-limit 2 --defer-embedding-wgrad-compute --fim-rate 0.5 --langrl-env-config env.yaml
    --no-create-attention-mask-in-dataloader --legacy-tokenizer --empty-unused-memory-level 2 --apply-layernorm-1p
"""


def test_published_command_lines_start() -> None:
    words = PUBLISHED.split()
    validate(parse_arguments(words), 8, Packages(transformer_engine=True, apex=True))


def test_all_that_is_refused_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = "--num-experts 8 --num-experts 8 --multi-latent-attention --use-megatron-fsdp --num-layres 4 --lr abc "
    words += "--hidden-size 64 --num-attention-heads 7 --tensor-model-parallel-size 2 --num-layers 4 --seq-length 8 "
    words += "--micro-batch-size 1 --tokenizer-type NullTokenizer --vocab-size 9 --mock-data"
    with pytest.raises(ProblemsError) as caught:
        settings_of_run(words.split())
    lines = str(caught.value).split(ProblemsError.SEPARATOR)
    expected = [
        "--num-experts",
        "--multi-latent-attention",
        "--use-megatron-fsdp",
        "--num-layres",
        "--lr takes",
    ]
    for line, beginning in zip(lines, expected, strict=False):
        assert beginning in line
    assert len(lines) == len(expected) + 1
    assert lines[-1] == "not given: --lr; give each on the command line or in --config"
    with pytest.raises(ProblemsError) as caught:
        settings_of_run([*words.replace("--lr abc", "--lr 1").split(), "--train-iters", "2"])
    assert len(str(caught.value).split(ProblemsError.SEPARATOR)) > len(expected) + 1


def test_a_config_file_is_told_of_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("num-experts: 8\nnum-layres: 2\nlr: abc\n")
    with pytest.raises(ProblemsError) as caught:
        parse_arguments(["--config", str(file)])
    assert len(str(caught.value).split(ProblemsError.SEPARATOR)) == 3


def test_how_to_recompute_without_recompute_has_no_effect(logged: pytest.LogCaptureFixture) -> None:
    config = parse_arguments(["--recompute-method", "block", "--recompute-num-layers", "1"])
    assert config == parse_arguments([])
    assert [record.message for record in logged.records] == [
        "--recompute-method, --recompute-num-layers has no effect without --recompute-granularity full"
    ]
