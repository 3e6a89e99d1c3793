"""The tap: each gradient-carrying pass of layer k meets its own microbatch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_let.mcore.layer_tap import LayerTap, find_layer


class Layer(torch.nn.Module):
    """Stands for a transformer layer: hidden states in, (hidden states, context) out."""

    def __init__(self, layer_number: int = 1) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.linear(hidden), "context"


class Attached:
    """Remembers what met what: (target, first number of the hidden states)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def __call__(self, hidden: torch.Tensor, target: str) -> torch.Tensor:
        self.seen.append((target, float(hidden.detach().flatten()[0])))
        return hidden * 2


def chunk(*numbers: int) -> Any:
    layers = [SimpleNamespace(layer_number=number) for number in numbers]
    return cast(Any, SimpleNamespace(decoder=SimpleNamespace(layers=layers)))


@pytest.mark.parametrize(
    ("number", "owner"), [(1, 0), (2, 0), (5, 1), (6, 1), (3, None), (0, None), (7, None)]
)
def test_the_owner_is_found_by_the_global_layer_number(number: int, owner: int | None) -> None:
    chunks = [chunk(1, 2), chunk(5, 6)]  # the virtual stages of pipeline rank 0 of 2
    found = find_layer(chunks, number)
    assert (None if found is None else found[0]) == owner
    assert found is None or cast(Any, found[1]).layer_number == number


def test_forwards_take_targets_first_in_first_out() -> None:
    layer, attached = Layer(), Attached()
    tap = LayerTap(layer, attached)
    tap.push("first")
    tap.push("second")
    plain = [layer.linear(torch.full((1, 3), value)) for value in (1.0, 2.0)]
    outputs = [layer(torch.full((1, 3), value)) for value in (1.0, 2.0)]
    assert [target for target, _ in attached.seen] == ["first", "second"]
    assert [value for _, value in attached.seen] == [float(p.detach()[0, 0]) for p in plain]
    for output, expected in zip(outputs, plain, strict=True):
        assert torch.equal(output[0], expected * 2)
        assert output[1] == "context"
    tap.check_drained()


def test_without_a_target_the_layer_is_as_it_was() -> None:
    layer, attached = Layer(), Attached()
    LayerTap(layer, attached)
    hidden = torch.ones(1, 3)
    assert torch.equal(layer(hidden)[0], layer.linear(hidden))
    assert attached.seen == []


def test_a_pass_without_gradient_leaves_the_queue_alone() -> None:
    layer, attached = Layer(), Attached()
    tap = LayerTap(layer, attached)
    tap.push("target")
    with torch.no_grad():
        layer(torch.ones(1, 3))
    assert attached.seen == []
    with pytest.raises(AssertionError, match="1 microbatches never met"):
        tap.check_drained()


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_under_recompute_the_second_pass_takes_the_target_of_its_microbatch(in_flight: int) -> None:
    """Pipeline schedules run several forwards before the first backward, first in, first out."""
    layer, attached = Layer(), Attached()
    tap = LayerTap(layer, attached)
    outputs = []
    for index in range(in_flight):
        tap.push(f"target {index}")
        hidden = torch.full((1, 3), float(index), requires_grad=True)
        outputs.append(checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=True))
    assert attached.seen == [], "the first pass runs without gradient"
    for output in outputs:
        output.sum().backward()
    expected = [float(layer.linear(torch.full((1, 3), float(i))).detach()[0, 0]) for i in range(in_flight)]
    assert attached.seen == [(f"target {i}", value) for i, value in enumerate(expected)]
    tap.check_drained()


def test_a_removed_tap_is_gone() -> None:
    layer, attached = Layer(), Attached()
    tap = LayerTap(layer, attached)
    tap.push("target")
    tap.remove()
    tap.check_drained()
    layer(torch.ones(1, 3))
    assert attached.seen == []
    assert not layer._forward_hooks
