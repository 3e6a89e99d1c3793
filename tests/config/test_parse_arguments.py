"""The command line and --config: strict, the same names, the command line wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.training.arguments import parse_arguments

Parse = Callable[..., RunConfig]


def message_of(words: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_one_flag_fills_every_section_that_has_it() -> None:
    config = parse_arguments(["--bf16", "--use-distributed-optimizer"])
    assert config.transformer.bf16
    assert config.optimizer.bf16
    assert config.optimizer.use_distributed_optimizer
    assert config.ddp.use_distributed_optimizer


def test_megatrons_spellings_reach_cores_fields() -> None:
    config = parse_arguments(
        [
            "--disable-bias-linear",
            "--norm-epsilon",
            "1e-6",
            "--fp8-format",
            "hybrid",
            "--decoder-first-pipeline-num-layers",
            "3",
            "--no-persist-layer-norm",
            "--apply-layernorm-1p",
            "--attention-backend",
            "flash",
            "--fp8-param-gather",
            "--override-opt-param-scheduler",
            "--rampup-batch-size",
            "16",
            "16",
            "1000",
            "--no-mmap-bin-files",
        ]
    )
    assert config.transformer.add_bias_linear is False
    assert config.transformer.layernorm_epsilon == 1e-6
    assert config.transformer.fp8 == "hybrid"
    assert config.transformer.num_layers_in_first_pipeline_stage == 3
    assert config.transformer.persist_layer_norm is False
    assert config.transformer.layernorm_zero_centered_gamma
    assert config.transformer.attention_backend.name == "flash"
    assert config.transformer.fp8_param
    assert config.ddp.fp8_param_gather
    assert config.schedule.override_opt_param_scheduler
    assert config.training.rampup_batch_size == (16, 16, 1000)
    assert config.data.mmap_bin_files is False


def test_both_spellings_of_the_scheduler_override_are_known() -> None:
    assert parse_arguments(["--override-opt_param-scheduler"]).schedule.override_opt_param_scheduler


def test_values_can_follow_an_equals_sign_be_negative_or_many() -> None:
    config = parse_arguments(["--lr=3e-4", "--data-path", "0.3", "a", "0.7", "b", "--seed", "7"])
    assert config.optimizer.lr == 3e-4
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert "1 or more" not in message_of(["--lr", "-1e-3x"])
    assert parse_arguments(["--min-lr", "-1"]).optimizer.min_lr == -1


def test_the_last_of_a_flag_given_twice_counts() -> None:
    assert parse_arguments(["--seed", "1", "--seed", "2"]).training.seed == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-layer", "4"], "unknown flag --num-layer; did you mean --num-layers?"),
        (["--let-wieght", "1"], "did you mean --let-weight?"),
        (["-lr", "1"], "unknown flag -lr"),
        (["--qqq"], "unknown flag --qqq"),
        (["--num-lay", "4"], "unknown flag"),
        (["--num-layers", "four"], "--num-layers takes a whole number, got 'four'"),
        (["--num-layers", "4.0"], "a whole number"),
        (["--num-layers"], "--num-layers takes one value (a whole number), got none"),
        (["--num-layers", "4", "5"], "got 4 5"),
        (["--lr", "fast"], "--lr takes a number, got 'fast'"),
        (["--lr", "nan"], "--lr takes a number"),
        (["--lr-decay-style", "cosinus"], "--lr-decay-style is one of constant, linear, cosine"),
        (["--attention-backend", "quick"], "one of flash, fused, unfused, local, auto"),
        (["--empty-unused-memory-level", "3"], "one of 0, 1, 2"),
        (["--bf16", "true"], "--bf16 is a switch and takes no value, got true"),
        (["--rampup-batch-size", "16", "16"], "--rampup-batch-size takes 3 values"),
        (["--data-path"], "--data-path takes at least one value"),
        (["run.yaml"], "'run.yaml' belongs to no flag"),
        (["--config"], "--config takes one file"),
        (["--config", "/nowhere/run.yaml"], "--config /nowhere/run.yaml cannot be read"),
        (["--tokenizer-type", "TikTokenizer"], "--tokenizer-type is one of HuggingFaceTokenizer"),
        (["--ckpt-format", "torch"], "--ckpt-format is one of torch_dist, got 'torch'"),
    ],
)
def test_what_cannot_be_understood_is_one_line_that_says_what_is_allowed(
    words: list[str], expected: str
) -> None:
    assert expected in message_of(words)


def test_the_config_file_holds_the_same_names_and_the_command_line_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "num-layers: 4\nhidden_size: 64\nlr: 1e-4\nmin-lr: 1\nbf16: true\nno-persist-layer-norm: true\n"
        "norm-epsilon: 1.0e-6\nadd_bias_linear: false\ndata-path: [0.5, a, 0.5, b]\nattention-backend: unfused\n"
        "rampup-batch-size: [8, 8, 100]\nload: null\n",
    )
    config = parse_arguments(["--hidden-size", "128", "--config", path, "--min-lr", "2e-5"])
    assert config.transformer.num_layers == 4
    assert config.transformer.hidden_size == 128
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-4, 2e-5)
    assert config.transformer.bf16
    assert config.transformer.persist_layer_norm is False
    assert config.transformer.layernorm_epsilon == 1e-6
    assert config.transformer.add_bias_linear is False
    assert config.data.data_path == ("0.5", "a", "0.5", "b")
    assert config.transformer.attention_backend.name == "unfused"
    assert config.training.rampup_batch_size == (8, 8, 100)


def test_a_switch_of_the_config_file_can_be_turned_back_by_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "masked-softmax-fusion: true\n")
    assert parse_arguments(["--config", path]).transformer.masked_softmax_fusion is True
    config = parse_arguments(["--config", path, "--no-masked-softmax-fusion"])
    assert config.transformer.masked_softmax_fusion is False


def test_every_switch_of_the_config_file_can_be_turned_back(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "bf16: true\nswiglu: true\ndisable-bias-linear: true\nmmap_bin_files: false\nno-save-optim: true\n",
    )
    config = parse_arguments(["--config", path])
    assert config.transformer.bf16
    assert not config.transformer.add_bias_linear
    undone = "--no-bf16 --no-swiglu --no-disable-bias-linear --mmap-bin-files --save-optim"
    assert parse_arguments(["--config", path, *undone.split()]) == parse_arguments([])
    assert parse_arguments(["--no-bf16", "--bf16"]).transformer.bf16, "the last counts"


def test_a_fusion_that_the_file_does_not_turn_off_is_left_open(tmp_path: Path) -> None:
    path = write(tmp_path, "no-masked-softmax-fusion: false\nno-mmap-bin-files: false\n")
    assert parse_arguments(["--config", path]) == parse_arguments([])
    path = write(tmp_path, "no-masked-softmax-fusion: true\n")
    assert parse_arguments(["--config", path]).transformer.masked_softmax_fusion is False


ALTERNATIVES = [
    ("train-iters: 100\n", "--train-samples 800", "training", {"train_iters": None, "train_samples": 800}),
    ("train-samples: 800\n", "--train-iters 9", "training", {"train_iters": 9, "train_samples": None}),
    ("let-stop-iters: 10\n", "--let-stop-fraction 0.5", "let", {"let_stop_iters": None, "let_stop_fraction": 0.5}),
    ("let-stop-fraction: 0.1\n", "--let-stop-iters 5", "let", {"let_stop_iters": 5, "let_stop_fraction": None}),
    (
        "lr-warmup-iters: 5\nlr-warmup-samples: 6\n",
        "--lr-warmup-fraction 0.1",
        "schedule",
        {"lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_warmup_fraction": 0.1},
    ),
    ("lr-warmup-fraction: 0.1\n", "--lr-warmup-iters 5", "schedule", {"lr_warmup_iters": 5, "lr_warmup_fraction": None}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words", "section", "expected"), ALTERNATIVES)
def test_one_way_to_say_it_on_the_command_line_replaces_another_in_the_file(
    tmp_path: Path, text: str, words: str, section: str, expected: dict[str, Any]
) -> None:
    config = parse_arguments(["--config", write(tmp_path, text), *words.split()])
    found = getattr(config, section)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num-layer: 4\n", "unknown name num-layer in the config file; did you mean num_layers?"),
        ("num-layers: 4.0\n", "num-layers in the config file takes a whole number, got 4.0"),
        ("num-layers: '4'\n", "takes a whole number, got '4'"),
        ("num-layers: true\n", "takes a whole number, got True"),
        ("num-layers: [4]\n", "takes a whole number"),
        ("lr: fast\n", "lr takes a number"),
        ("bf16: 1\n", "bf16 in the config file is true or false, got 1"),
        ("bf16: 'yes'\n", "true or false"),
        ("seed: null\n", "takes a whole number, got None"),
        ("save: 5\n", "save in the config file takes text, got 5; quote it"),
        ("lr-decay-style: linaer\n", "one of constant"),
        ("rampup-batch-size: [8, 8]\n", "takes 3 values"),
        ("num-layers: 4\nnum-layers: 5\n", "num-layers is given twice"),
        ("num-layers: 4\nnum_layers: 5\n", "a second time"),
        ("norm-epsilon: 1e-5\nlayernorm_epsilon: 1e-5\n", "a second time"),
        ("virtual_pipeline_model_parallel_size: 2\n", "unknown name"),
        ("- num-layers\n", "must hold lines of the form name: value"),
        ("4: 5\n", "must hold lines of the form name: value"),
        ("num-layers: [\n", "is not YAML"),
        ("use-checkpoint-args: true\n", "--use-checkpoint-args is not supported"),
        ("num-experts: 8\n", "--num-experts is not supported"),
        ("config: other.yaml\n", "unknown name config"),
    ],
)
def test_the_config_file_is_read_strictly(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message_of(["--config", write(tmp_path, text)])


def test_flags_of_megatron_in_the_config_file_are_judged_as_on_the_command_line(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    path = write(
        tmp_path, "use-mcore-models: true\nuse_legacy_models: false\nnum-experts: 0\nprofile: false\n"
    )
    parse_arguments(["--config", path])
    assert [record.message.split()[0] for record in logged.records] == ["--use-mcore-models"]


def test_an_empty_config_file_is_no_settings(tmp_path: Path) -> None:
    assert parse_arguments(["--config", write(tmp_path, "")]) == parse_arguments([])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_grouped_shows_defaults_and_exits_0(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--num-layers", "4", flag])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.index("\nLET:") < text.index("\nmodel:") < text.index("\ncheckpoints:")
    assert "--let-weight X" in text
    assert "(default: 0.1)" in text
    assert max(len(line) for line in text.splitlines()) <= 112
    assert "--no-bf16" not in text


def test_version_prints_it_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("megatron_let ")


def test_only_the_first_rank_prints_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert capsys.readouterr().out == ""
