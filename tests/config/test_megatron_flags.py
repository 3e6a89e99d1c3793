"""Every flag of Megatron-LM is a setting here, accepted without effect, or refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megatron_let.config.megatron_flags import REFUSED, WITHOUT_EFFECT
from megatron_let.config.run_config import all_settings
from megatron_let.errors import ConfigError
from megatron_let.mcore.settings import CORE_SECTIONS
from megatron_let.training.arguments import parse_arguments

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
