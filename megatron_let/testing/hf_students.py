"""Hugging Face twins of tiny Megatron students: the same weights in a model that others wrote.

A twin's `to_hf` only cuts and reorders tensors, so it carries weights and gradients alike.

    twin = build_twin(STUDENTS["llama"], weights, vocab_size=61)   # weights: see testing/one_iteration.py
    expected = {name: p.grad for name, p in twin.model.named_parameters()}
    assert_close(twin.to_hf(gradients), expected)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

NUM_LAYERS, NUM_HEADS, FFN, CONTEXT = 4, 4, 96, 32
"""Shape of `testing.training.TINY_STUDENT`, which the flags below change."""

_GPT2_LIKE = {
    "--normalization": "LayerNorm",
    "--group-query-attention": False,
    "--num-query-groups": False,
    "--swiglu": False,
    "--disable-bias-linear": False,
}


@dataclass(frozen=True)
class StudentFamily:
    """A kind of student: what it changes in TINY_STUDENT, and which Hugging Face model computes the same."""

    name: str
    style: str  # "llama", "gpt2" or "neox": whose names and layout the twin has
    flags: Mapping[str, Any] = field(default_factory=dict)
    hf_settings: Mapping[str, Any] = field(default_factory=dict)
    num_groups: int = 2
    head_size: int = 12
    hidden_size: int = 48
    is_tied: bool = False

    def __str__(self) -> str:
        """Return the name, for test ids."""
        return self.name


STUDENTS: Mapping[str, StudentFamily] = {
    family.name: family
    for family in (
        StudentFamily("llama", "llama"),
        StudentFamily(
            "llama-tied",
            "llama",
            flags={
                "--untie-embeddings-and-output-weights": False,
                "--kv-channels": 16,
                "--rotary-base": 50,
                "--norm-epsilon": 1e-3,
            },
            hf_settings={"rope_theta": 50.0, "rms_norm_eps": 1e-3},
            head_size=16,
            is_tied=True,
        ),
        StudentFamily("qwen3", "llama", flags={"--qk-layernorm": None}, hf_settings={"qk_norm": True}),
        StudentFamily(
            "gpt2",
            "gpt2",
            flags={
                **_GPT2_LIKE,
                "--position-embedding-type": "learned_absolute",
                "--untie-embeddings-and-output-weights": False,
            },
            num_groups=4,
            is_tied=True,
        ),
        StudentFamily(
            "gpt2-squared-relu",
            "gpt2",
            flags={
                **_GPT2_LIKE,
                "--position-embedding-type": "learned_absolute",
                "--untie-embeddings-and-output-weights": False,
                "--squared-relu": None,
            },
            hf_settings={"activation_function": "relu2"},
            num_groups=4,
            is_tied=True,
        ),
        StudentFamily(
            "neox",
            "neox",
            flags={**_GPT2_LIKE, "--hidden-size": 64, "--rotary-percent": 0.25},
            num_groups=4,
            head_size=16,
            hidden_size=64,
        ),
    )
}


@dataclass(frozen=True)
class Twin:
    """A Hugging Face model with the student's weights, its blocks in order, and the way from Megatron's names."""

    model: Any
    blocks: Any
    to_hf: Callable[[Tensors], Tensors]


def build_twin(family: StudentFamily, weights: Tensors, *, vocab_size: int) -> Twin:
    """Build the twin of a student with these whole weights; rows of vocabulary padding are left out."""
    convert = {"llama": _to_llama, "gpt2": _to_gpt2, "neox": _to_neox}[family.style]

    def to_hf(tensors: Tensors) -> Tensors:
        real = {name: t[:vocab_size] if _is_vocabulary(name) else t for name, t in tensors.items()}
        return convert(family, real)

    model = empty_twin(family, vocab_size).eval()
    missing, unexpected = model.load_state_dict(to_hf(weights), strict=False)
    assert not unexpected, f"no place for {unexpected}"
    expected = ["lm_head.weight"] if family.is_tied else []
    assert missing == expected, f"not filled: {missing}"
    blocks = {"llama": "model.layers", "gpt2": "transformer.h", "neox": "gpt_neox.layers"}[family.style]
    return Twin(model, model.get_submodule(blocks), to_hf)


def _is_vocabulary(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")


def empty_twin(family: StudentFamily, vocab_size: int) -> Any:
    """Return the family's Hugging Face model with weights that are still random."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": family.hidden_size,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": family.is_tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    settings = dict(family.hf_settings)
    if family.style == "llama":
        theta = settings.pop("rope_theta", 10000.0)
        shape.update(
            num_key_value_heads=family.num_groups,
            intermediate_size=FFN,
            head_dim=family.head_size,
            rms_norm_eps=settings.pop("rms_norm_eps", 1e-5),
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        if settings.pop("qk_norm", False):
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    if family.style == "gpt2":
        # Megatron's unfused GELU is the exact one.
        settings.setdefault("activation_function", "gelu")
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**shape, n_inner=FFN, **dropouts, **settings)
        )
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **shape,
            intermediate_size=FFN,
            use_parallel_residual=False,  # Megatron adds attention before the MLP reads
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        )
    )


def _layers(tensors: Tensors) -> dict[int, Tensors]:
    """Return the tensors of each layer, by names inside it."""
    layers: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers."):
            index, inner = name.removeprefix("decoder.layers.").split(".", 1)
            layers.setdefault(int(index), {})[inner] = tensor
    return layers


def _split_qkv(family: StudentFamily, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut Megatron's fused rows: each query group holds its queries, then its key, then its value."""
    queries = NUM_HEADS // family.num_groups
    # [groups, queries + 2, head size, ...]
    by_group = fused.view(family.num_groups, queries + 2, family.head_size, *fused.shape[1:])
    parts = by_group[:, :queries], by_group[:, queries], by_group[:, queries + 1]
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in parts)


def _to_llama(family: StudentFamily, tensors: Tensors) -> Tensors:
    result = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
    }
    if not family.is_tied:
        result["lm_head.weight"] = tensors["output_layer.weight"]
    for index, layer in _layers(tensors).items():
        q, k, v = _split_qkv(family, layer["self_attention.linear_qkv.weight"])
        gate, up = layer["mlp.linear_fc1.weight"].chunk(2)
        inner = {
            "input_layernorm": layer["input_layernorm.weight"],
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer["self_attention.linear_proj.weight"],
            "post_attention_layernorm": layer["pre_mlp_layernorm.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer["mlp.linear_fc2.weight"],
        }
        for side in ("q", "k"):
            if f"self_attention.{side}_layernorm.weight" in layer:
                inner[f"self_attn.{side}_norm"] = layer[f"self_attention.{side}_layernorm.weight"]
        result.update({f"model.layers.{index}.{name}.weight": tensor for name, tensor in inner.items()})
    return result


def _to_gpt2(family: StudentFamily, tensors: Tensors) -> Tensors:
    result = {
        "transformer.wte.weight": tensors["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": tensors["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": tensors["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": tensors["decoder.final_layernorm.bias"],
    }
    for index, layer in _layers(tensors).items():
        for kind in ("weight", "bias"):
            inner = {
                "ln_1": layer[f"input_layernorm.{kind}"],
                "attn.c_attn": torch.cat(_split_qkv(family, layer[f"self_attention.linear_qkv.{kind}"])),
                "attn.c_proj": layer[f"self_attention.linear_proj.{kind}"],
                "ln_2": layer[f"pre_mlp_layernorm.{kind}"],
                "mlp.c_fc": layer[f"mlp.linear_fc1.{kind}"],
                "mlp.c_proj": layer[f"mlp.linear_fc2.{kind}"],
            }
            for name, tensor in inner.items():
                # GPT-2's linear layers keep their weights as [in, out].
                result[f"transformer.h.{index}.{name}.{kind}"] = tensor.t() if tensor.dim() == 2 else tensor
    return result


def _to_neox(family: StudentFamily, tensors: Tensors) -> Tensors:
    result = {
        "gpt_neox.embed_in.weight": tensors["embedding.word_embeddings.weight"],
        "gpt_neox.final_layer_norm.weight": tensors["decoder.final_layernorm.weight"],
        "gpt_neox.final_layer_norm.bias": tensors["decoder.final_layernorm.bias"],
        "lm_head.weight": tensors["output_layer.weight"],
    }
    names = {
        "input_layernorm": "input_layernorm",
        "attention.query_key_value": "self_attention.linear_qkv",  # head by head, as with one group a head
        "attention.dense": "self_attention.linear_proj",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.dense_h_to_4h": "mlp.linear_fc1",
        "mlp.dense_4h_to_h": "mlp.linear_fc2",
    }
    for index, layer in _layers(tensors).items():
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                result[f"gpt_neox.layers.{index}.{ours}.{kind}"] = layer[f"{theirs}.{kind}"]
    return result
