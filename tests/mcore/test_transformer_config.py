"""From our settings to megatron-core's: what depends on the device."""

from __future__ import annotations

from typing import Any

import torch

from megatron_let.config.derive import resolve
from megatron_let.mcore.transformer_config import build_transformer_config
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments


def test_no_activation_needs_a_compiler_on_cpu() -> None:
    for flag in ("--swiglu", "--squared-relu", None):
        changes: dict[str, Any] = {"--mock-data": None, "--swiglu": False}
        if flag is not None:
            changes[flag] = None
        config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)
        activation = build_transformer_config(config, is_on_gpu=False).activation_func
        assert not hasattr(activation, "_torchdynamo_orig_callable"), flag  # what torch.compile leaves


def test_squared_relu_is_the_square_of_the_positive_part() -> None:
    changes = {"--mock-data": None, "--swiglu": False, "--squared-relu": None}
    config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)
    activation = build_transformer_config(config, is_on_gpu=False).activation_func
    assert activation(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0.0, 0.0, 9.0]
