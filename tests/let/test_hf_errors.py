"""Every teacher directory that is not what it should be gives one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_let.errors import ConfigError
from megatron_let.let import load_hf_teacher
from megatron_let.testing.tiny_teachers import write_tiny_teacher


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return directories of whole tiny models."""
    root = tmp_path_factory.mktemp("originals")
    for family in ("llama", "gpt2"):
        write_tiny_teacher(family, root / family)
    return {family: root / family for family in ("llama", "gpt2")}


@pytest.fixture
def teacher_directory(originals: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(originals["llama"], tmp_path / "teacher"))


def load(directory: Path, layer: int | None = None) -> Any:
    return load_hf_teacher(directory, layer=layer, dtype=torch.float32, device="cpu")


def refusal(directory: Path, layer: int | None = None) -> str:
    """Return the one line with which `directory` is refused."""
    with pytest.raises(ConfigError) as caught:
        load(directory, layer)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def drop_weight(directory: Path, name: str) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    edit_weights(directory, drop)


def test_the_undamaged_copy_loads(teacher_directory: Path) -> None:
    assert load(teacher_directory).hidden_size == 24


def test_missing_path(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_directory(teacher_directory: Path) -> None:
    assert "is not a directory" in refusal(teacher_directory / "config.json")


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "of-no-known-kind"}'])
def test_unusable_config(teacher_directory: Path, text: str) -> None:
    (teacher_directory / "config.json").write_text(text)
    assert "config.json" in refusal(teacher_directory)


@pytest.mark.parametrize("layer", [0, -1, 4])
def test_layer_outside_the_model(teacher_directory: Path, layer: int) -> None:
    message = refusal(teacher_directory, layer)
    assert f"--let-teacher-layer {layer}" in message
    assert "1 to 3" in message


@pytest.mark.parametrize("kept", [0, 4, 300, -1])
def test_truncated_safetensors(teacher_directory: Path, kept: int) -> None:
    file = teacher_directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors" in refusal(teacher_directory)


def test_no_weights(teacher_directory: Path) -> None:
    (teacher_directory / "model.safetensors").unlink()
    assert "holds no weights" in refusal(teacher_directory)


def test_pickle_weights_only(teacher_directory: Path) -> None:
    weights = load_file(teacher_directory / "model.safetensors")
    torch.save(weights, teacher_directory / "pytorch_model.bin")
    (teacher_directory / "model.safetensors").unlink()
    message = refusal(teacher_directory)
    assert "pytorch_model.bin" in message
    assert "run code" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../other/a.safetensors", "/tmp/a.safetensors"])
def test_an_index_that_names_other_than_its_own_safetensors(teacher_directory: Path, name: str) -> None:
    (teacher_directory / "model.safetensors").unlink()
    index = {"weight_map": {"embed": name}}
    (teacher_directory / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(teacher_directory)
    assert f"names {name} in its model.safetensors.index.json; only .safetensors files" in message


def test_code_of_others_in_the_place_of_attention(teacher_directory: Path) -> None:
    edit_config(
        teacher_directory, _attn_implementation="someone/kernel", attn_implementation="someone/kernel"
    )
    assert "asks for attention code of its own (someone/kernel)" in refusal(teacher_directory)


def test_an_adapter_of_another_model(teacher_directory: Path) -> None:
    (teacher_directory / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    assert "is an adapter of another model" in refusal(teacher_directory)


def write_shards(directory: Path) -> dict[str, str]:
    """Replace the single file by two shards and an index, and return the index's map."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: weights[name] for name in members}, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return weight_map


def test_shards_load_like_a_single_file(teacher_directory: Path) -> None:
    tokens = torch.arange(8)[None]
    expected = load(teacher_directory).states(tokens)
    write_shards(teacher_directory)
    assert torch.equal(load(teacher_directory).states(tokens), expected)


def test_missing_or_truncated_shard_and_broken_index(teacher_directory: Path) -> None:
    write_shards(teacher_directory)
    shard = teacher_directory / "b.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    assert "b.safetensors" in refusal(teacher_directory)
    shard.unlink()
    assert "lacks b.safetensors" in refusal(teacher_directory)
    for text in ("{", "{}", '{"weight_map": []}'):
        (teacher_directory / "model.safetensors.index.json").write_text(text)
        assert "index.json" in refusal(teacher_directory)


@pytest.mark.parametrize("layer", [None, 1])
def test_missing_weight_is_never_replaced_by_a_random_one(teacher_directory: Path, layer: int | None) -> None:
    drop_weight(teacher_directory, "model.layers.0.mlp.up_proj.weight")
    message = refusal(teacher_directory, layer)
    assert "layers.0.mlp.up_proj.weight" in message


def test_a_hole_above_the_chosen_layer_does_not_matter(teacher_directory: Path) -> None:
    drop_weight(teacher_directory, "model.layers.2.mlp.up_proj.weight")
    assert load(teacher_directory, 2).hidden_size == 24
    assert "layers.2.mlp.up_proj.weight" in refusal(teacher_directory)


def test_checkpoint_under_other_names(teacher_directory: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[f"other.{name}"] = weights.pop(name)

    edit_weights(teacher_directory, rename)
    assert "lacks" in refusal(teacher_directory)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.bias", "layers.1.mlp.gate.bias", "model.extra.weight"]
)
def test_weights_of_the_body_without_a_place(teacher_directory: Path, name: str) -> None:
    edit_weights(teacher_directory, lambda weights: weights.update({name: torch.zeros(24)}))
    assert name in refusal(teacher_directory)
    if name.startswith("model.layers.1"):
        assert name in refusal(teacher_directory, 2)
        assert load(teacher_directory, 1).hidden_size == 24, "block 2 is not part of this teacher"


def test_heads_are_not_missed_and_not_minded(teacher_directory: Path) -> None:
    def add_heads(weights: dict[str, torch.Tensor]) -> None:
        weights.update({"lm_head.weight": torch.zeros(67, 24), "score.weight": torch.zeros(2, 24)})

    edit_weights(teacher_directory, add_heads)
    assert load(teacher_directory).hidden_size == 24


def test_config_with_fewer_layers_than_the_checkpoint(teacher_directory: Path) -> None:
    edit_config(teacher_directory, num_hidden_layers=2)
    assert "model.layers.2." in refusal(teacher_directory)


@pytest.mark.parametrize("changes", [{"vocab_size": 70}, {"intermediate_size": 48}, {"num_hidden_layers": 4}])
def test_config_that_does_not_fit_the_weights(teacher_directory: Path, changes: dict[str, int]) -> None:
    edit_config(teacher_directory, **changes)
    refusal(teacher_directory)


def test_checkpoint_of_the_bare_body_loads(originals: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    body = transformers.AutoModel.from_pretrained(originals["gpt2"])
    body.save_pretrained(tmp_path)  # names without the prefix "transformer."
    tokens = torch.arange(8)[None]
    assert torch.equal(load(tmp_path, 2).states(tokens), load(originals["gpt2"], 2).states(tokens))
    edit_weights(tmp_path, lambda weights: weights.update({"h.0.extra.weight": torch.zeros(3)}))
    assert "h.0.extra.weight" in refusal(tmp_path)


def test_encoders_and_encoder_decoders(tmp_path: Path) -> None:
    import transformers

    shape = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.BertModel(transformers.BertConfig(**shape, intermediate_size=40))
    encoder.save_pretrained(tmp_path / "bert")
    assert "depends on the tokens after it" in refusal(tmp_path / "bert")
    both = transformers.T5Config(vocab_size=67, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    transformers.T5Model(both).save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in refusal(tmp_path / "t5")


def test_weights_that_are_not_finite(teacher_directory: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(teacher_directory, lambda weights: weights[name].fill_(float("nan")))
    assert "not finite" in refusal(teacher_directory)
    assert load(teacher_directory, 1).hidden_size == 24


def test_code_in_the_directory_is_not_run_unless_asked(
    teacher_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "was-run"
    (teacher_directory / "own_code.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaModel\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-kind'\n"
        "class OwnModel(LlamaModel):\n    config_class = OwnConfig\n"
    )
    edit_config(
        teacher_directory,
        model_type="own-kind",
        auto_map={"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"},
    )
    assert "--let-trust-remote-code" in refusal(teacher_directory)
    assert not trace.exists()

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    teacher = load_hf_teacher(
        teacher_directory, layer=None, dtype=torch.float32, device="cpu", trust_remote_code=True
    )
    assert trace.exists()
    assert "OwnModel" in teacher.description
