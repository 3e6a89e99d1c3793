"""Tiny random teachers: causal language models of the tested families, written to disk in Hugging Face form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY, WIDTH, NUM_LAYERS, CONTEXT = 67, 24, 3, 32
FAMILIES = ("llama", "llama-untied", "opt", "opt-350m", "gpt-neox", "gpt2")


def tiny_teacher_config(family: str, context: int = CONTEXT) -> Any:
    """Return the configuration of a model with 3 layers of width 24 and `context` positions."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if family.startswith("llama"):
        return transformers.LlamaConfig(
            **shape, num_key_value_heads=2, intermediate_size=40, tie_word_embeddings=family == "llama"
        )
    if family == "opt":
        return transformers.OPTConfig(**shape, ffn_dim=40, word_embed_proj_dim=WIDTH)
    if family == "opt-350m":  # norms after the sublayers, none at the end, narrower embedding and output
        return transformers.OPTConfig(**shape, ffn_dim=40, word_embed_proj_dim=16, do_layer_norm_before=False)
    if family == "gpt-neox":
        return transformers.GPTNeoXConfig(**shape, intermediate_size=40)
    assert family == "gpt2"
    return transformers.GPT2Config(**shape)


def write_tiny_teacher(family: str, directory: Path, context: int = CONTEXT) -> Any:
    """Write a random model to `directory` and return it, in evaluation mode.

    The weights are spread wider than the families' own 0.02, so that every part of a block shows in the result.
    """
    import transformers

    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(tiny_teacher_config(family, context)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model
