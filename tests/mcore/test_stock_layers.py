"""The stock norms and attention against torch's, Hugging Face's and megatron-core's own.

fp32 throughout; two kernels for the same few sums differ by some roundings of 6e-8.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing import assert_close

from megatron_let.mcore import model
from megatron_let.mcore.batch import _document_mask
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.stock_layers import (
    SdpaCoreAttention,
    StockNorm,
    add_to_residual,
    stock_layer_spec,
)

ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
WIDTH, HEADS, HEAD_SIZE = 24, 4, 6


def core_config(**changes: Any) -> TransformerConfig:
    """Return a core config of one small layer on CPU."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**{**values, **changes})


def reference_norm(kind: str) -> torch.nn.Module:
    if kind == "LayerNorm":
        return torch.nn.LayerNorm(WIDTH, eps=1e-3)
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(WIDTH, eps=1e-3)


@pytest.mark.parametrize("is_zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_norm_is_the_reference_forward_and_backward(kind: str, is_zero_centered: bool) -> None:
    config = core_config(normalization=kind, layernorm_zero_centered_gamma=is_zero_centered)
    ours, reference = StockNorm(config, WIDTH, eps=1e-3), reference_norm(kind)
    offset = 1.0 if is_zero_centered else 0.0
    assert torch.equal(ours.weight + offset, torch.ones(WIDTH)), "a fresh norm scales by 1"
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.randn(WIDTH, generator=random))
            getattr(ours, name).copy_(parameter - (offset if name == "weight" else 0.0))
    hidden = torch.randn(5, 2, WIDTH, generator=random) * 0.1
    upstream = torch.randn(5, 2, WIDTH, generator=random)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    results = [norm(x) for norm, x in zip((ours, reference), inputs, strict=True)]
    for result in results:
        result.backward(upstream)
    assert_close(results[0], results[1], **ROUNDING)
    assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)  # gradients are divided by 0.1
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert_close(getattr(ours, name).grad, parameter.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_sequence_parallel", [False, True])
def test_norm_weights_tell_whether_their_gradient_is_a_partial_sum(is_sequence_parallel: bool) -> None:
    config = core_config(
        normalization="LayerNorm", sequence_parallel=is_sequence_parallel, tensor_model_parallel_size=2
    )
    norm = StockNorm(config, WIDTH)
    assert all(
        vars(parameter)["sequence_parallel"] is is_sequence_parallel for parameter in norm.parameters()
    )


def attention_inputs(groups: int, *, length: int = 12) -> list[torch.Tensor]:
    """Return query [s, b, heads, d] and key, value [s, b, groups, d] that require gradient."""
    random = torch.Generator().manual_seed(1)
    heads = (HEADS, groups, groups)
    return [torch.randn(length, 2, n, HEAD_SIZE, generator=random).requires_grad_() for n in heads]


def attend(
    kind: type, config: TransformerConfig, mask: torch.Tensor | None, **options: Any
) -> list[torch.Tensor]:
    """Return the context and the gradients of query, key and value."""
    attention = kind(config, 3, AttnMaskType.causal, "self", **options)
    inputs = attention_inputs(config.num_query_groups)
    context = attention(*inputs, mask)
    upstream = torch.randn(context.shape, generator=torch.Generator().manual_seed(2))
    return [context, *torch.autograd.grad(context, inputs, upstream)]


def document_mask() -> torch.Tensor:
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[0, [0, 5, 6]] = True
    starts[1, [0, 9]] = True
    return _document_mask(starts)


@pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.7}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"apply_query_key_layer_scaling": True}], ids=str)
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_that_of_megatron_core(
    groups: int,
    has_documents: bool,
    changes: dict[str, Any],
    options: dict[str, Any],
    one_process: ParallelContext,
) -> None:
    config = core_config(num_query_groups=groups, masked_softmax_fusion=False, **changes)
    mask = document_mask() if has_documents else None
    ours = attend(SdpaCoreAttention, config, mask, **options)
    reference = attend(DotProductAttention, config, mask, **options)
    for actual, expected in zip(ours, reference, strict=True):
        assert_close(actual, expected, **ROUNDING)


def test_attention_sees_neither_later_tokens_nor_other_documents() -> None:
    attention = SdpaCoreAttention(core_config(), 1, AttnMaskType.causal, "self")
    query, key, value = attention_inputs(HEADS)
    context = attention(query, key, value, document_mask())
    # row 0 holds documents 0-4, 5, 6-11: token 8 sees tokens 6, 7, 8
    (gradient,) = torch.autograd.grad(context[8, 0].sum(), value)
    seen = gradient.abs().sum(dim=(2, 3)) > 0  # [s, b]
    assert torch.nonzero(seen[:, 0]).flatten().tolist() == [6, 7, 8]
    assert not seen[:, 1].any()


def test_evaluation_drops_nothing() -> None:
    attention = SdpaCoreAttention(core_config(attention_dropout=0.9), 1, AttnMaskType.causal, "self").eval()
    plain = SdpaCoreAttention(core_config(), 1, AttnMaskType.causal, "self")
    inputs = attention_inputs(HEADS)
    assert torch.equal(attention(*inputs, None), plain(*inputs, None))


def test_dropout_keeps_the_mean(one_process: ParallelContext) -> None:
    attention = SdpaCoreAttention(core_config(attention_dropout=0.5), 1, AttnMaskType.causal, "self")
    inputs = attention_inputs(HEADS)
    draws = torch.stack([attention(*inputs, None) for _ in range(2000)])
    expected = attention.eval()(*inputs, None)
    assert draws.std(dim=0).mean() > 0.1
    # the mean of 2,000 draws of standard deviation up to 3 is off by 0.07 at one sigma; 48 x 12 of them
    assert_close(draws.mean(dim=0), expected, rtol=0, atol=0.35)


@pytest.mark.parametrize("is_sequence_parallel", [False, True])
def test_dropout_draws_from_the_generator_megatron_core_uses(
    is_sequence_parallel: bool, one_process: ParallelContext
) -> None:
    """Heads are split over tensor-parallel ranks, so each rank needs its own draws: the tracker's."""
    config = core_config(
        attention_dropout=0.5, sequence_parallel=is_sequence_parallel, tensor_model_parallel_size=2
    )
    attention = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self")
    before = torch.get_rng_state()
    attention(*attention_inputs(HEADS), None)
    assert torch.equal(torch.get_rng_state(), before) is not is_sequence_parallel


def test_what_the_stock_attention_cannot_do_is_refused() -> None:
    with pytest.raises(AssertionError, match="context parallel"):
        SdpaCoreAttention(core_config(context_parallel_size=2), 1, AttnMaskType.causal, "self")
    with pytest.raises(AssertionError, match="causal"):
        SdpaCoreAttention(core_config(), 1, AttnMaskType.padding, "self")
    attention = SdpaCoreAttention(core_config(), 1, AttnMaskType.causal, "self")
    with pytest.raises(AssertionError, match="packed"):
        attention(*attention_inputs(HEADS), None, packed_seq_params=object())
    with pytest.raises(AssertionError, match="bias"):
        attention(*attention_inputs(HEADS), None, attention_bias=torch.zeros(1))


@pytest.mark.parametrize("has_qk_norm", [False, True])
def test_the_layer_spec_uses_the_stock_parts(has_qk_norm: bool) -> None:
    layer = stock_layer_spec(core_config(qk_layernorm=has_qk_norm)).submodules
    attention = layer.self_attention.submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is StockNorm
    assert attention.core_attention is SdpaCoreAttention
    assert (attention.q_layernorm is StockNorm) == (attention.k_layernorm is StockNorm) == has_qk_norm


@pytest.mark.parametrize("has_document_masks", [False, True])
def test_layers_of_transformer_engine_mask_documents_by_the_stock_attention(
    has_document_masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own attention, told that the mask is causal, would leave the given one unread."""

    class Theirs(torch.nn.Module):
        """Stands for Transformer Engine's attention."""

    def their_spec(**_: Any) -> Any:
        spec = stock_layer_spec(core_config())
        spec.submodules.self_attention.submodules.core_attention = Theirs
        return spec

    monkeypatch.setattr(model, "get_gpt_layer_with_transformer_engine_spec", their_spec)
    spec: Any = model._layer_spec(
        core_config(), None, cast(Any, None), has_te_layers=True, has_document_masks=has_document_masks
    )
    attention = spec.submodules.self_attention.submodules.core_attention
    assert attention is (SdpaCoreAttention if has_document_masks else Theirs)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_a_norm_of_an_fp32_residual_gives_what_the_next_matrix_takes(kind: str) -> None:
    norm = StockNorm(core_config(normalization=kind, params_dtype=torch.bfloat16), WIDTH)
    hidden = torch.randn(5, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    assert norm(hidden).dtype is torch.bfloat16
    expected = StockNorm(core_config(normalization=kind), WIDTH)(hidden)
    assert torch.equal(norm(hidden), expected.bfloat16()), "computed in fp32, rounded once"


def test_an_fp32_residual_stays_fp32_and_is_not_rounded() -> None:
    add = add_to_residual(True, False)
    residual, output = torch.full((2,), 1.0 + 2**-20), torch.full((2,), 0.5, dtype=torch.bfloat16)
    bias = torch.full((2,), 0.25, dtype=torch.bfloat16)
    assert torch.equal(add((output, bias), residual, 0.0), torch.full((2,), 1.75 + 2**-20))
    assert torch.equal(add((output, None), residual, 1.0), residual)
    assert torch.equal(add_to_residual(False, False)((output, None), residual, 1.0), residual + 0.5)
    config = core_config(fp32_residual_connection=True, bf16=True, params_dtype=torch.bfloat16)
    layer = stock_layer_spec(config).submodules
    assert layer.self_attn_bda is layer.mlp_bda is add_to_residual
