"""Floating-point operations of training, and the GPUs that do them."""

from __future__ import annotations

from typing import NamedTuple

from megatron_let.config.run_config import RunConfig


class Gpu(NamedTuple):
    """A device as its maker states it."""

    bf16_tflops: float
    """Dense peak in TFLOP/s."""

    memory: float
    """Its makers say GB; the device itself reports about as many GiB."""


GPUS = {
    "A100": Gpu(312.0, 80.0),
    "A800": Gpu(312.0, 80.0),
    "H100": Gpu(989.0, 80.0),
    "H100 PCIe": Gpu(756.0, 80.0),
    "H100 NVL": Gpu(835.0, 94.0),
    "H200": Gpu(989.0, 141.0),
    "H800": Gpu(989.0, 80.0),
    "GH200": Gpu(989.0, 96.0),
    "L40S": Gpu(362.0, 48.0),
    "B200": Gpu(2250.0, 180.0),
    "GB200": Gpu(2250.0, 186.0),
}


def training_flops_per_token(config: RunConfig, padded_vocab_size: int) -> float:
    """Return forward + backward FLOPs of one token of the student.

    Matrix products only, a multiply-add counted as two, backward as twice the forward, causal attention as half the
    square; activation recompute is not counted (model FLOPs, as MFU wants them).
    """
    t, seq = config.transformer, config.model.seq_length
    attention_width = t.kv_channels * t.num_attention_heads
    kv_width = t.kv_channels * t.num_query_groups
    projections = t.hidden_size * (2 * attention_width + 2 * kv_width)
    scores = attention_width * seq  # q k^T and the weighted sum of v, each over half the square
    mlp = t.hidden_size * t.ffn_hidden_size * (3 if config.model.swiglu else 2)
    head = t.hidden_size * padded_vocab_size
    forward = 2.0 * (t.num_layers * (projections + scores + mlp) + head)
    return 3.0 * forward


def gpu_of(device_name: str) -> Gpu | None:
    """Return a device by its name, or None when it is not in the table."""
    matches = [name for name in GPUS if name in device_name]
    return GPUS[max(matches, key=len)] if matches else None


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a device by its name, or None when it is not in the table."""
    gpu = gpu_of(device_name)
    return None if gpu is None else gpu.bf16_tflops * 1e12
