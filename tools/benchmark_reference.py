"""The bare PyTorch loop that `tools/benchmark.py` holds our training step against: one file, nothing of this project.

A LLaMA-style GPT (RMSNorm, SwiGLU, RoPE, grouped-query attention through torch's SDPA) and the loop that one would
write around it: F.cross_entropy, clip_grad_norm_, torch.optim.AdamW. On a GPU autocast to bf16 and fused AdamW, as
such loops do. Notation: b batch, s sequence, h width, n heads, g key/value heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GptShape:
    """The sizes of a GPT."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    seq_length: int
    vocab_size: int
    norm_eps: float = 1e-5
    rotary_base: float = 10000.0
    init_std: float = 0.02

    @property
    def head_width(self) -> int:
        """Return d."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class LoopSettings:
    """What the loop does beside the model."""

    micro_batch_size: int
    num_microbatches: int
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip_grad: float
    is_fused: bool
    """AdamW in one kernel a tensor: torch's `fused=True`."""

    log_interval: int
    is_bf16: bool
    """Compute in bf16 by autocast; weights stay in fp32."""


class RmsNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(shape: GptShape) -> tuple[Tensor, Tensor]:
    """Return cos and sin [s, d] of the rotary angles; both halves of a head turn by the same angles."""
    exponents = torch.arange(0, shape.head_width, 2, dtype=torch.float32) / shape.head_width
    angles = torch.outer(torch.arange(shape.seq_length).float(), shape.rotary_base**-exponents)  # [s, d / 2]
    angles = torch.cat([angles, angles], dim=-1)  # [s, d]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` [b, n, s, d] by its position's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query self-attention."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.hidden_size, sum(self._widths()), bias=False)
        self.out = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def _widths(self) -> list[int]:
        key_value = self.shape.num_query_groups * self.shape.head_width
        return [self.shape.hidden_size, key_value, key_value]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [b, s, h] for `x` [b, s, h]."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, -1, self.shape.head_width).transpose(1, 2)  # [b, n or g, s, d]
            for part in self.qkv(x).split(self._widths(), dim=-1)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        is_grouped = self.shape.num_query_groups != self.shape.num_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and gated MLP, each behind a norm and beside the residual stream."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(shape.hidden_size, shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = RmsNorm(shape.hidden_size, shape.norm_eps)
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.ffn_hidden_size, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return [b, s, h] for `x` [b, s, h]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Gpt(nn.Module):
    """Tokens in, logits out; input and output embedding are two matrices."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        cos, sin = rotary_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=shape.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [b, s, v] of `tokens` [b, s]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def weights_of_megatron(state: Mapping[str, Tensor], shape: GptShape) -> dict[str, Tensor]:
    """Return `Gpt`'s weights from the un-sharded state of a megatron-core GPTModel, in fp32.

    Megatron stores q, k and v of each key/value head together: [g, (n / g + 2) * d, h]. Transformer Engine's layers
    hold each norm's weight in the linear layer behind it.
    """
    weights = {
        "embedding.weight": state["embedding.word_embeddings.weight"],
        "norm.weight": state["decoder.final_layernorm.weight"],
        "head.weight": state["output_layer.weight"],
    }
    for index in range(shape.num_layers):
        theirs, ours = f"decoder.layers.{index}", f"blocks.{index}"
        has_own_norms = f"{theirs}.input_layernorm.weight" in state
        norms = (
            ("input_layernorm.weight", "pre_mlp_layernorm.weight")
            if has_own_norms
            else ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        )
        weights[f"{ours}.attention_norm.weight"] = state[f"{theirs}.{norms[0]}"]
        weights[f"{ours}.mlp_norm.weight"] = state[f"{theirs}.{norms[1]}"]
        qkv = state[f"{theirs}.self_attention.linear_qkv.weight"]
        weights[f"{ours}.attention.qkv.weight"] = _ungrouped(qkv, shape)
        weights[f"{ours}.attention.out.weight"] = state[f"{theirs}.self_attention.linear_proj.weight"]
        weights[f"{ours}.gate_up.weight"] = state[f"{theirs}.mlp.linear_fc1.weight"]
        weights[f"{ours}.down.weight"] = state[f"{theirs}.mlp.linear_fc2.weight"]
    return {name: weight.detach().float().cpu() for name, weight in weights.items()}


def _ungrouped(qkv: Tensor, shape: GptShape) -> Tensor:
    d = shape.head_width
    grouped = qkv.view(shape.num_query_groups, -1, shape.hidden_size)  # [g, (n / g + 2) * d, h]
    q, k, v = grouped.split([grouped.shape[1] - 2 * d, d, d], dim=1)
    return torch.cat([part.reshape(-1, shape.hidden_size) for part in (q, k, v)])


class BareLoop:
    """The training loop; with a process group of several ranks, torch's DistributedDataParallel."""

    def __init__(
        self,
        shape: GptShape,
        settings: LoopSettings,
        *,
        weights: Mapping[str, Tensor],
        tokens: Tensor,
        device: torch.device,
    ) -> None:
        """Start from `weights`; `tokens` [samples, s + 1] are this rank's, in the order of training."""
        self._settings = settings
        self._tokens = tokens.to(device)
        self._device = device
        self._next_sample = 0
        self._num_steps = 0
        self._loss_sum = torch.zeros((), device=device)
        gpt = Gpt(shape)
        gpt.load_state_dict(dict(weights))
        gpt.to(device)
        self._model: nn.Module = gpt
        if dist.is_initialized() and dist.get_world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self._model = nn.parallel.DistributedDataParallel(gpt, device_ids=ids)
        decayed = [parameter for parameter in gpt.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in gpt.parameters() if parameter.dim() == 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True if settings.is_fused else None,
        )
        self._losses: list[float] = []

    @torch.no_grad()
    def first_loss(self) -> float:
        """Return the mean loss over this rank's first global batch, from the weights as they are."""
        size = self._settings.micro_batch_size
        losses = [
            float(self._loss(self._tokens[size * index : size * (index + 1)]))
            for index in range(self._settings.num_microbatches)
        ]
        return sum(losses) / len(losses)

    def losses(self) -> list[float]:
        """Return the mean losses of the logging intervals so far."""
        return self._losses

    def step(self) -> None:
        """Do one optimizer step over one global batch."""
        settings = self._settings
        self._optimizer.zero_grad()
        for index in range(settings.num_microbatches):
            rows = self._tokens[self._next_sample : self._next_sample + settings.micro_batch_size]
            self._next_sample += settings.micro_batch_size
            with self._synchronised(is_last=index == settings.num_microbatches - 1):
                loss = self._loss(rows) / settings.num_microbatches
                loss.backward()
            self._loss_sum += loss.detach()
        nn.utils.clip_grad_norm_(self._model.parameters(), settings.clip_grad)
        self._optimizer.step()
        self._num_steps += 1
        if self._num_steps % settings.log_interval == 0:
            self._losses.append(float(self._loss_sum) / settings.log_interval)
            self._loss_sum.zero_()

    def _synchronised(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Reduce gradients over the ranks in the last microbatch's backward only."""
        if isinstance(self._model, nn.parallel.DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return nullcontext()

    def _loss(self, rows: Tensor) -> Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._settings.is_bf16):
            logits = self._model(rows[:, :-1])  # [b, s, v]
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
