"""The tracer against sums done by hand and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_let.planning.tracing import Tracer, traced


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_is_counted_from_its_making_to_its_end(device: str) -> None:
    held = torch.ones(100, device=device)
    with Tracer(device) as tracer:
        tracer.see(held, is_counted=False)
        first = held * 2  # 400 bytes
        view = first[:50]
        first = first.add_(1)
        assert tracer.live_bytes == 400
        second = view.double()  # 400 bytes
        assert tracer.live_bytes == 800
        del first, view
        assert tracer.live_bytes == 400
        del second
    assert (tracer.live_bytes, tracer.peak_bytes) == (0, 800)


def test_other_devices_do_not_count() -> None:
    with Tracer("meta") as tracer:
        kept = torch.ones(10) * 2
    assert (tracer.peak_bytes, kept.numel()) == (0, 10)


def test_what_a_linear_layer_keeps_is_its_input_and_flops_are_three_products() -> None:
    weight = torch.ones(8, 4, device="meta", requires_grad=True)
    with Tracer() as tracer:
        tracer.see(weight, is_counted=False)
        inputs = torch.ones(16, 4, device="meta", requires_grad=True)  # 256 bytes
        output = F.linear(inputs, weight)  # 512 bytes
        assert tracer.live_bytes == 768
        output.backward(torch.ones_like(output))
    assert tracer.flops == 3 * 2 * 16 * 4 * 8


def test_fused_attention_keeps_no_scores() -> None:
    b, n, s, d = 2, 3, 16, 8
    query = torch.ones(b, n, s, d, device="meta", requires_grad=True)
    before = F.scaled_dot_product_attention
    with traced() as tracer:
        tracer.see(query, is_counted=False)
        output = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        # the result and one number a row; scores would be b n s s
        assert tracer.live_bytes == 4 * b * n * s * d + 4 * b * n * s
        assert output.shape == query.shape
        assert output.transpose(1, 2).is_contiguous()
        forward = tracer.flops
        output.sum().backward()
    assert F.scaled_dot_product_attention is before
    real = torch.ones(b, n, s, d)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        F.scaled_dot_product_attention(real, real, real)
    assert forward == counter.get_total_flops() / 2  # half of the square is masked
    assert tracer.flops == 3 * forward


def test_a_number_that_does_not_exist_is_not_made_up() -> None:
    with traced(), pytest.raises(AssertionError, match="a tensor without values"):
        torch.ones(1, device="meta").item()
