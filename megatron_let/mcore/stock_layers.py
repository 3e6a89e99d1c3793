"""Stock layers for megatron-core's local spec: norms that allow sequence parallel and SDPA core attention.

They replace the two parts of the local spec that stand in the way where Transformer Engine is absent: its torch
norm refuses sequence parallel, and its core attention materialises the s x s scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_let.mcore.stock_kernels import rms_norm


class StockNorm(torch.nn.Module):
    """LayerNorm or RMSNorm as `config.normalization` says, computed in fp32.

    Under sequence parallel each rank sees a slice of the sequence, so the weight's gradient is a partial sum; the
    attribute `sequence_parallel` on the parameters makes Megatron add them over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.is_rms = config.normalization == "RMSNorm"
        self.is_zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.is_zero_centered else torch.ones
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias: torch.nn.Parameter | None = None
        if not self.is_rms:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of `hidden` [..., h], in the type of the weights: it may be an fp32 residual."""
        weight = (self.weight + 1 if self.is_zero_centered else self.weight).to(hidden.dtype)
        if self.is_rms and hidden.device.type != "cuda":
            normed = rms_norm(hidden, weight, self.eps)
        elif self.is_rms:
            normed = F.rms_norm(hidden, weight.shape, weight, self.eps)
        else:
            bias = None if self.bias is None else self.bias.to(hidden.dtype)
            normed = F.layer_norm(hidden, weight.shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


class SdpaCoreAttention(torch.nn.Module):
    """Causal core attention through torch's scaled_dot_product_attention; no parameters.

    Heads are already split over the tensor-parallel group, so nothing is communicated. Context parallel is not
    supported (it needs Transformer Engine's attention).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallel needs Transformer Engine's attention"
        assert attn_mask_type is AttnMaskType.causal, f"the stock attention is causal, not {attn_mask_type}"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.is_sequence_parallel = config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Return the context [s, b, heads * d] of `query` [s, b, heads, d] over `key`, `value` [s, b, groups, d].

        `attention_mask` [b or 1, 1, s, s] is True where a position must NOT be seen (Megatron's convention) and
        already holds the causal triangle; None means causal.
        """
        assert packed_seq_params is None, "packed sequences need Transformer Engine's attention"
        assert attention_bias is None, "an attention bias needs Transformer Engine's attention"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, n, d] -> [b, n, s, d]
        allowed = None if attention_mask is None else ~attention_mask
        if self.dropout > 0.0 and self.training and not self.is_sequence_parallel:
            with get_cuda_rng_tracker().fork():
                context = self._attend(q, k, v, allowed)
        else:
            context = self._attend(q, k, v, allowed)
        context = context.permute(2, 0, 1, 3)  # [b, n, s, d] -> [s, b, n, d]
        return context.reshape(*context.shape[:2], -1)  # [s, b, n * d]

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=allowed is None,
            scale=self.softmax_scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )


def add_to_residual(
    is_training: bool, _is_fused: bool
) -> Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]:
    """Return the sum of a layer's output, its bias and the residual [s, b, h], in the residual's type.

    megatron-core's own brings the residual to the type of the output first, which ends an fp32 residual stream at its
    first addition.
    """

    def add(
        output_and_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        output, bias = output_and_bias
        if bias is not None:
            output = output + bias
        return residual + F.dropout(output, p=dropout, training=is_training)

    return add


def stock_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return megatron-core's local layer spec with the stock norms, SDPA attention and residual put in.

    The checkpoint keys stay those of Transformer Engine's fused layers, so checkpoints are exchangeable.
    """
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer = spec.submodules
    layer.input_layernorm = StockNorm
    layer.pre_mlp_layernorm = StockNorm
    if config.fp32_residual_connection:
        layer.self_attn_bda = layer.mlp_bda = add_to_residual
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    qk_norm = StockNorm if config.qk_layernorm else IdentityOp
    attention.q_layernorm = attention.k_layernorm = qk_norm
    return spec
