"""A run's settings survive being saved and read, and the page that people read is a --config file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_let.config.derive import resolve
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.mcore.settings import CORE_SECTIONS
from megatron_let.training.arguments import parse_arguments

Parse = Callable[..., RunConfig]

RUNS = [
    "",
    "--bf16 --swiglu --position-embedding-type rope --disable-bias-linear --attention-backend local",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 8 "
    "--no-masked-softmax-fusion --recompute-granularity selective --recompute-modules mlp layernorm",
    "--let-teacher-load /teachers/a: --let-weight 1e-7 --save out --save-interval 10 --load out",
    "--fp16 --tensor-model-parallel-size 2 --sequence-parallel --split 90,5,5 --no-mmap-bin-files",
]


@pytest.mark.parametrize("words", RUNS)
def test_to_dict_and_back_through_json(parse: Parse, words: str) -> None:
    config = resolve(parse(words), 2)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict())), CORE_SECTIONS) == config


@pytest.mark.parametrize("words", RUNS)
def test_the_printed_settings_start_the_same_run(parse: Parse, words: str, tmp_path: Path) -> None:
    config = resolve(parse(words), 2)
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml())
    assert resolve(parse_arguments(["--config", str(path)]), 2) == config


def test_the_printed_settings_name_each_value_once_under_its_section(parse: Parse) -> None:
    lines = parse("--bf16").to_yaml().splitlines()
    assert "bf16: true" in lines
    names = [line.split(":")[0] for line in lines if not line.startswith("#")]
    assert len(names) == len(set(names))
    assert lines[0] == "# model"
    assert "# let" in lines


def test_a_config_travels_to_another_process(parse: Parse) -> None:
    config = parse("--attention-backend local")
    assert pickle.loads(pickle.dumps(config)) == config


def test_saved_settings_of_an_older_version_get_defaults_and_unknown_names_are_an_error(parse: Parse) -> None:
    saved = parse().to_dict()
    del saved["let"]
    del saved["training"]["seed"]
    assert RunConfig.from_dict(saved, CORE_SECTIONS).training.seed == 1234
    saved["training"]["later_setting"] = 1
    with pytest.raises(ConfigError, match="unknown names in section training: later_setting"):
        RunConfig.from_dict(saved, CORE_SECTIONS)
