"""Read a GPT from a checkpoint of any layout, whole, onto this rank alone, and run its body.

megatron-core's own loader is collective over all ranks; a teacher is loaded by the ranks of one pipeline stage only,
so the tensors are read through torch's distributed-checkpoint reader without communication.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.mcore.checkpoint import read_tensors, stored_entries
from megatron_let.mcore.model import build_gpt
from megatron_let.mcore.settings import CORE_SECTIONS
from megatron_let.mcore.transformer_config import build_transformer_config

# The word embedding's name in a checkpoint; its first dimension is the padded vocabulary.
_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")


class FrozenGpt:
    """The body of a GPT (no LM head), un-sharded, without gradient: token ids in, states of one layer out."""

    def __init__(self, model: GPTModel, *, context_length: int | None, with_final_norm: bool) -> None:
        self.model = model
        self.context_length = context_length
        self.has_last_states = with_final_norm
        self._decoder = model.decoder if with_final_norm else _without_final_norm(model)

    @property
    def hidden_size(self) -> int:
        """Return the width of the states."""
        return int(self.model.config.hidden_size)

    @property
    def num_ids(self) -> int:
        """Return the rows of the embedding, padding included."""
        return int(self.model.embedding.word_embeddings.weight.shape[0])

    @torch.no_grad()
    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states [n, l, h] of `tokens` [n, l]; every row is a sequence of its own from position 0."""
        model = self.model
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = model.embedding(input_ids=tokens, position_ids=positions)  # [l, n, h]
        rotary = None
        if model.position_embedding_type == "rope":
            rotary = model.rotary_pos_emb(tokens.shape[1])
        states = self._decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
        return states.transpose(0, 1)  # [n, l, h]


def _without_final_norm(model: GPTModel) -> torch.nn.Module:
    model.decoder.final_layernorm = None
    return model.decoder


def load_frozen_gpt(
    directory: Path,
    saved_config: Mapping[str, Any],
    *,
    layer: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenGpt:
    """Load the body of the GPT in checkpoint `directory`, trained with `saved_config`.

    `layer` N < number of layers gives the raw output of layer N, and the layers above are neither built nor run;
    None or the last gives the states after the final norm.

    Raises:
        ConfigError: tensors are missing, or of another shape than `saved_config` says.
    """
    stored = stored_entries(directory)
    embedding = stored.get(_EMBEDDING)
    if embedding is None:
        raise ConfigError(f"checkpoint {directory} holds no {_EMBEDDING}: it is not a GPT checkpoint")
    _require_stored_sizes(RunConfig.from_dict(saved_config, CORE_SECTIONS), stored, directory)
    gpt = build_frozen_gpt(
        saved_config, padded_vocab_size=int(embedding.size[0]), layer=layer, dtype=dtype, device=device
    )
    weights = _read(stored, directory, names=_stored_names(gpt.model))
    _fill(gpt.model, weights, directory)
    gpt.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return gpt


def read_head(directory: Path) -> torch.Tensor:
    """Return the weight [ids, h] of the LM head in a checkpoint, which is the embedding's where the two are one.

    Raises:
        ConfigError: it cannot be read.
    """
    stored = stored_entries(directory)
    name = _HEAD if _HEAD in stored else _EMBEDDING
    return read_tensors(directory, {name: stored[name]})[name]


def build_frozen_gpt(
    saved_config: Mapping[str, Any],
    *,
    padded_vocab_size: int,
    layer: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> FrozenGpt:
    """Build what `load_frozen_gpt` loads, without weights; they may lie on the CPU until they are moved to `device`."""
    config = RunConfig.from_dict(saved_config, CORE_SECTIONS)
    num_layers = config.transformer.num_layers
    assert layer is None or 1 <= layer <= num_layers, f"checked before: layer {layer} of {num_layers}"
    built = num_layers if layer is None else layer
    model = _build_alone(config, built, padded_vocab_size=padded_vocab_size, dtype=dtype, device=device)
    has_positions = config.model.position_embedding_type == "learned_absolute"
    limit = config.model.max_position_embeddings if has_positions else config.model.seq_length
    return FrozenGpt(model, context_length=limit, with_final_norm=built == num_layers)


def _require_stored_sizes(
    config: RunConfig, stored: Mapping[str, TensorStorageMetadata], directory: Path
) -> None:
    """Hold the sizes in the settings against the stored tensors, before memory is taken for a model of those sizes."""
    sizes = config.transformer
    kv_channels = sizes.kv_channels or sizes.hidden_size // (sizes.num_attention_heads or 1)
    ffn_size = sizes.ffn_hidden_size or 4 * sizes.hidden_size
    expected = {
        "decoder.layers.self_attention.linear_proj.weight": (
            sizes.num_layers,
            sizes.hidden_size,
            sizes.num_attention_heads * kv_channels,
        ),
        "decoder.layers.mlp.linear_fc2.weight": (sizes.num_layers, sizes.hidden_size, ffn_size),
        "embedding.position_embeddings.weight": (config.model.max_position_embeddings, sizes.hidden_size),
    }
    for name, shape in expected.items():
        if name in stored and tuple(stored[name].size) != shape:
            raise ConfigError(
                f"checkpoint {directory} holds {name} of shape {tuple(stored[name].size)}, its settings say {shape}"
            )
    queries = stored.get("decoder.layers.self_attention.linear_qkv.weight")
    groups = sizes.num_query_groups or sizes.num_attention_heads
    if queries is not None and (sizes.num_attention_heads + 2 * groups) * kv_channels not in queries.size:
        raise ConfigError(
            f"checkpoint {directory} holds queries of shape {tuple(queries.size)}, its settings say "
            f"{sizes.num_attention_heads} heads in {groups} groups of width {kv_channels}"
        )


def _fill(model: GPTModel, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    try:
        model.load_state_dict(_to_module_names(model, weights), strict=True)
    except (RuntimeError, IndexError) as error:  # another shape than the module's
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"checkpoint {directory} does not fit its own settings: {text}") from error


def _build_alone(
    config: RunConfig, num_layers: int, *, padded_vocab_size: int, dtype: torch.dtype, device: torch.device
) -> GPTModel:
    """Build the first `num_layers` layers with stock layers on groups that hold this rank alone."""
    transformer = dataclasses.replace(
        config.transformer,
        num_layers=num_layers,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        sequence_parallel=False,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
        recompute_modules=None,
        distribute_saved_activations=False,
        fp8=None,
        fp8_param=False,
        first_last_layers_bf16=False,
        overlap_p2p_comm_warmup_flush=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=None,
        bias_dropout_fusion=None,
        apply_rope_fusion=None,
        persist_layer_norm=None,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    model_settings = dataclasses.replace(config.model, transformer_impl="local")
    alone = dataclasses.replace(config, transformer=transformer, model=model_settings)
    core = build_transformer_config(alone, is_on_gpu=device.type == "cuda")
    model = build_gpt(
        alone,
        core,
        padded_vocab_size=padded_vocab_size,
        groups=_groups_of_one(),
        pre_process=True,
        post_process=True,
        vp_stage=None,
        has_te_layers=False,
    )
    del model.output_layer
    return model


def _groups_of_one() -> ProcessGroupCollection:
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return ProcessGroupCollection(
        tp=alone, pp=alone, cp=alone, embd=alone, pos_embd=alone, dp=alone, dp_cp=alone
    )


def _stored_names(model: GPTModel) -> dict[str, str]:
    """Return module parameter name -> checkpoint name; layers are stacked along a first dimension there."""
    names = {}
    for name, _ in model.named_parameters():
        match = _LAYER.match(name)
        inner = name if match is None else f"decoder.layers.{match.group(2)}"
        inner = inner.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        names[name] = inner.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return names


def _read(
    stored: Mapping[str, TensorStorageMetadata], directory: Path, *, names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    missing = sorted(set(names.values()) - stored.keys())
    if missing:
        raise ConfigError(f"checkpoint {directory} lacks the tensor {missing[0]}")
    return read_tensors(directory, {name: stored[name] for name in sorted(set(names.values()))})


def _to_module_names(model: GPTModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Unstack the layers: [layers, ...] under one name becomes one tensor a layer."""
    state = dict(model.state_dict())
    for name, stored_name in _stored_names(model).items():
        match = _LAYER.match(name)
        tensor = weights[stored_name]
        state[name] = tensor if match is None else tensor[int(match.group(1))]
    return state
