"""Teachers whose arithmetic, configuration or weight file is not LLaMA's: what `transformers` computes, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_let.errors import ConfigError
from megatron_let.let import Teacher, load_hf_teacher, segment_states
from megatron_let.let.hf_teacher import empty_hf_teacher
from megatron_let.planning.tracing import traced
from megatron_let.testing.tiny_teachers import write_tiny_teacher

IDS, WIDTH, LAYERS = 67, 32, 4


def load(directory: Path, layer: int | None = None) -> Teacher:
    return load_hf_teacher(directory, layer=layer, dtype=torch.float32, device="cpu")


def config_of(family: str) -> Any:
    """Return the configuration of a tiny model of 4 layers."""
    import transformers as hf

    ids: dict[str, Any] = {"vocab_size": IDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    shape: dict[str, Any] = {**ids, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    make: dict[str, Callable[[], Any]] = {
        # residuals are scaled by 1 / sqrt(layers)
        "minicpm3": lambda: hf.MiniCPM3Config(
            **shape,
            **{**heads, "num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
        # the kinds of their layers follow from the configuration
        "mamba": lambda: hf.MambaConfig(**shape, state_size=8),
        "mamba2": lambda: hf.Mamba2Config(**shape, state_size=8, num_heads=8, head_dim=8, n_groups=1),
        "falcon_mamba": lambda: hf.FalconMambaConfig(**shape, state_size=8),
        "jamba": lambda: hf.JambaConfig(
            **shape, **heads, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8
        ),
        "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(**shape, **heads, attention_window_size=16),
        "mpt": lambda: hf.MptConfig(
            **ids, d_model=WIDTH, n_heads=4, n_layers=LAYERS, expansion_ratio=2, max_seq_len=32
        ),
        "gpt_neo": lambda: hf.GPTNeoConfig(
            **ids,
            hidden_size=WIDTH,
            num_layers=LAYERS,
            num_heads=4,
            attention_types=[[["global", "local"], 2]],
        ),
        "gptj": lambda: hf.GPTJConfig(**ids, n_embd=WIDTH, n_layer=LAYERS, n_head=4, rotary_dim=4),
        "codegen": lambda: hf.CodeGenConfig(**ids, n_embd=WIDTH, n_layer=LAYERS, n_head=4, rotary_dim=4),
        "falcon": lambda: hf.FalconConfig(**shape, num_attention_heads=4),
    }
    return make[family]()


def write_model(family: str, directory: Path) -> Any:
    """Write a random model, spread wider than its family's own 0.02, and return it."""
    import transformers

    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(
    "family", ["minicpm3", "mamba", "mamba2", "falcon_mamba", "jamba", "recurrent_gemma", "mpt"]
)
def test_a_middle_layer_is_that_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = write_model(family, tmp_path)
    tokens = torch.randint(IDS, (2, 16))
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    outputs: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(
            lambda b, i, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        last = model.base_model(tokens, use_cache=False).last_hidden_state
    for layer in range(1, LAYERS):
        assert torch.equal(load(tmp_path, layer).states(tokens), outputs[layer - 1]), f"layer {layer}"
    assert torch.equal(load(tmp_path).states(tokens), last)


def test_what_is_planned_holds_the_weights_that_are_loaded(tmp_path: Path) -> None:
    write_model("minicpm3", tmp_path)
    sizes = []
    for layer in (1, 2, None):
        loaded = load(tmp_path, layer)
        with traced():
            planned = empty_hf_teacher(tmp_path, layer=layer, dtype=torch.float32)
        assert [p.shape for p in planned.parameters()] == [p.shape for p in loaded.parameters()]
        assert planned.description == loaded.description
        sizes.append(sum(p.numel() for p in loaded.parameters()))
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_context_limit_under_another_name_makes_windows(tmp_path: Path) -> None:
    write_model("mpt", tmp_path)
    teacher = load(tmp_path)
    assert teacher.context_length == 32
    tokens = torch.randint(IDS, (1, 64))
    states = segment_states(teacher, tokens)
    assert torch.equal(states[:, 32:], segment_states(teacher, tokens[:, 32:]))


def test_blocks_that_are_not_run_in_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def forward(self: Any, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.wte(input_ids)
        for block in reversed(self.h):
            hidden = block(hidden)
        return hidden

    write_tiny_teacher("gpt2", tmp_path)
    monkeypatch.setattr(transformers.GPT2Model, "forward", forward)
    with pytest.raises(ConfigError, match="does not run its blocks one after the other: use its last layer"):
        load(tmp_path, 2)


def edit_weights(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def causal_mask() -> Tensor:
    return torch.ones(64, 64, dtype=torch.bool).tril()[None, None].clone()


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("gpt_neo", "transformer.h.1.attn.attention.bias", causal_mask()),
        ("gpt_neo", "transformer.h.1.attn.attention.masked_bias", torch.tensor(-1e9)),
        ("gptj", "transformer.h.0.attn.bias", causal_mask()),
        ("gptj", "transformer.h.0.attn.masked_bias", torch.tensor(-1e9)),
        ("codegen", "transformer.h.3.attn.causal_mask", causal_mask()),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor([-1e4])),
        ("gpt2", "h.0.attn.masked_bias", torch.tensor(-1e4)),
        ("falcon", "transformer.h.0.self_attention.rotary.inv_freq", torch.ones(4)),
        ("opt", "model.decoder.version", torch.tensor([3.0])),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(3)),
    ],
)
def test_buffers_of_older_files_are_passed_over(
    family: str, name: str, value: Tensor, tmp_path: Path
) -> None:
    write = write_tiny_teacher if family in ("gpt2", "opt", "llama") else write_model
    write(family, tmp_path)
    tokens = torch.randint(IDS, (1, 16))
    expected = load(tmp_path).states(tokens)
    edit_weights(tmp_path, lambda weights: weights.update({name: value}))
    assert torch.equal(load(tmp_path).states(tokens), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer.h.0.attn.attention.bias", torch.zeros(WIDTH)),
        ("transformer.h.0.attn.attention.masked_weight", torch.tensor(1.0)),
        ("transformer.h.0.version", torch.tensor([3.0])),
    ],
)
def test_a_weight_that_only_sounds_like_a_buffer_is_refused(name: str, value: Tensor, tmp_path: Path) -> None:
    write_model("gpt_neo", tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({name: value}))
    with pytest.raises(ConfigError, match=f"gives no place, among them {name}"):
        load(tmp_path)


@pytest.mark.parametrize("layer", [None, 2])
def test_a_tied_model_may_be_stored_by_its_head(layer: int | None, tmp_path: Path) -> None:
    write_tiny_teacher("llama", tmp_path)
    tokens = torch.randint(IDS, (1, 16))
    expected = load(tmp_path, layer).states(tokens)

    def rename(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    edit_weights(tmp_path, rename)
    assert torch.equal(load(tmp_path, layer).states(tokens), expected)


def test_an_untied_model_without_its_embedding_is_refused(tmp_path: Path) -> None:
    write_tiny_teacher("llama-untied", tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop("model.embed_tokens.weight"))
    with pytest.raises(ConfigError, match="lacks 1 of the model's weights"):
        load(tmp_path)
