"""Floating-point operations of training, and the peak rates they are held against."""

from __future__ import annotations

from megatron_let.config.run_config import RunConfig

# Dense bf16 peak of one device in TFLOP/s, as its maker states it.
PEAK_BF16_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "L40S": 362.0,
    "B200": 2250.0,
    "GB200": 2250.0,
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


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a device by its name, or None when it is not in the table."""
    matches = [name for name in PEAK_BF16_TFLOPS if name in device_name]
    return PEAK_BF16_TFLOPS[max(matches, key=len)] * 1e12 if matches else None
