"""FLOPs of training against torch's own count of a model's matrix products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_let.config.derive import resolve
from megatron_let.planning.flops import gpu_of, peak_flops, training_flops_per_token
from megatron_let.testing.hf_students import NUM_HEADS, NUM_LAYERS, STUDENTS, StudentFamily, empty_twin
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments

VOCABULARY, LENGTH = 61, 32


def counted_forward_flops(family: StudentFamily) -> float:
    """Return the FLOPs a token of the Hugging Face twin's forward pass, attention over the whole square."""
    model = empty_twin(family, VOCABULARY)
    model.set_attn_implementation("eager")  # plain matrix products
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long))
    return counter.get_total_flops() / LENGTH


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "neox"])
def test_flops_are_three_times_the_matrix_products_of_a_causal_forward_pass(name: str) -> None:
    family = STUDENTS[name]
    changes: dict[str, Any] = {**family.flags, "--mock-data": None}
    config = resolve(parse_arguments(arguments(TINY_STUDENT, changes)), 1)
    # a token meets LENGTH others twice (scores, weighted sum), 2 FLOPs each; causal is half of that
    square = NUM_LAYERS * 2 * 2 * LENGTH * NUM_HEADS * family.head_size
    expected = 3 * (counted_forward_flops(family) - square / 2)
    rotary = expected * 2e-3  # the counter sees the tiny product that makes rotary angles
    assert training_flops_per_token(config, VOCABULARY) == pytest.approx(expected, abs=rotary)


def test_a_padded_vocabulary_is_computed_and_so_counts() -> None:
    config = resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None})), 1)
    more = training_flops_per_token(config, 72) - training_flops_per_token(config, 61)
    assert more == 3 * 2 * 48 * (72 - 61)


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", (312.0, 80.0)),
        ("NVIDIA H100 80GB HBM3", (989.0, 80.0)),
        ("NVIDIA H100 PCIe", (756.0, 80.0)),
        ("NVIDIA H100 NVL", (835.0, 94.0)),
        (
            "NVIDIA GH200 480GB",
            (989.0, 96.0),
        ),  # holds the name of no H200 by accident: the longest name counts
        ("NVIDIA GB200", (2250.0, 186.0)),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_gpus_are_found_by_the_name_of_the_device(device: str, gpu: tuple[float, float] | None) -> None:
    assert gpu_of(device) == gpu
    assert peak_flops(device) == (None if gpu is None else gpu[0] * 1e12)
