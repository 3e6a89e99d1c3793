"""The teacher's own loss is that of the whole causal language model, and nothing of its head stays behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from megatron_let.let import load_hf_teacher
from megatron_let.let.own_loss import own_loss
from megatron_let.testing.tiny_teachers import CONTEXT, FAMILIES, VOCABULARY, write_tiny_teacher


def write_scaled(kind: str, directory: Path) -> Any:
    """Write a model whose logits are more than a product: capped, scaled, or with a bias."""
    import transformers as hf

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    config = {
        "capped": lambda: hf.Gemma2Config(**shape, head_dim=8, final_logit_softcapping=0.5),
        "scaled": lambda: hf.GraniteConfig(**shape, logits_scaling=3.0),
        "biased": lambda: hf.PhiConfig(**shape),
        "recurrent": lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
    }[kind]()
    torch.manual_seed(7)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("kind", [*FAMILIES, "capped", "scaled", "biased", "recurrent"])
def test_it_is_that_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    write = write_tiny_teacher if kind in FAMILIES else write_scaled
    model = write(kind, tmp_path)
    tokens = torch.randint(VOCABULARY, (3, CONTEXT))
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]  # [b, s - 1, v]
    expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    teacher = load_hf_teacher(tmp_path, layer=None, dtype=torch.float32, device="cpu")
    head = teacher.take_lm_head()
    assert head is not None
    total, count = own_loss(head, teacher.states(tokens), tokens)
    assert count == 3 * (CONTEXT - 1)
    # 1e-5: the head's product on one row at a time, fp32, losses of size 4 to 8
    torch.testing.assert_close((total / count).float(), expected, rtol=0, atol=1e-5)


def test_long_rows_are_taken_in_parts_up_to_a_few_thousand_tokens() -> None:
    tokens, states = torch.randint(7, (4, 3000)), torch.randn(4, 3000, 7)
    total, count = own_loss(lambda part, ids: part, states, tokens)
    row = torch.arange(2999)
    losses = [functional.cross_entropy(states[b, row], tokens[b, row + 1], reduction="none") for b in (0, 1)]
    assert 4096 <= int(count) < 4096 + 256
    expected = torch.cat(losses)[: int(count)].double().sum()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)  # sums of 4,000 fp32 numbers


def test_the_head_is_given_once_and_then_free(tmp_path: Path) -> None:
    write_tiny_teacher("llama-untied", tmp_path)
    teacher = load_hf_teacher(tmp_path, layer=None, dtype=torch.float32, device="cpu")
    size = sum(parameter.numel() for parameter in teacher.parameters())
    head = teacher.take_lm_head()
    weight = weakref.ref(head._model.lm_head.weight)  # type: ignore[union-attr]
    assert teacher.take_lm_head() is None
    gc.disable()
    try:
        del head
        assert weight() is None, "a reference cycle would keep it until the next collection"
    finally:
        gc.enable()
    assert sum(parameter.numel() for parameter in teacher.parameters()) == size


def test_a_middle_layer_and_a_bare_body_have_no_head(tmp_path: Path) -> None:
    import transformers

    write_tiny_teacher("gpt2", tmp_path / "whole")
    transformers.AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "body")
    for directory, layer in ((tmp_path / "whole", 2), (tmp_path / "body", None)):
        teacher = load_hf_teacher(directory, layer=layer, dtype=torch.float32, device="cpu")
        # GPT-2 ties: the bare body holds what its head is made of
        assert (teacher.take_lm_head() is None) == (layer is not None)
