"""A Hugging Face causal language model as a teacher: body only, frozen, from a local directory.

`transformers` builds and runs the model, so any of its causal families will do. What comes from here is the refusal
of everything that would make a teacher other than the one on disk: pickle weights, weights that do not fill the body
or that it has no place for, models whose tokens see the future.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_let.errors import ConfigError
from megatron_let.let.hf_files import (
    check_safetensors,
    config_error,
    quiet_transformers,
    read_config,
)
from megatron_let.let.hf_sizes import check_sizes
from megatron_let.let.teacher import Teacher, check_layer

LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    AssertionError,
    ArithmeticError,
    IndexError,
)
"""What `transformers` raises for a directory it cannot make a model of."""

RUN_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError)
"""What a model raises that needs more than token ids; a device out of memory is not among them."""


def check_hf_teacher(path: str | Path, *, layer: int | None, trust_remote_code: bool = False) -> Any:
    """Look at a teacher's files without taking memory for it and return its `transformers` configuration.

    Raises:
        ConfigError: not a causal language model, no readable safetensors weights, fewer of them than the model has,
            or no such layer.
    """
    directory = Path(path)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    stored = check_safetensors(directory)
    check_layer(directory, layer, config.num_hidden_layers)
    check_sizes(directory, config, stored, trust_remote_code=trust_remote_code)
    return config


def load_hf_teacher(
    path: str | Path,
    *,
    layer: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> Teacher:
    """Load the body of a causal language model from a local directory as a frozen teacher.

    Args:
        path: Hugging Face directory with config.json and safetensors weights; nothing is fetched.
        layer: N, 1-based. None or the number of layers gives the last hidden state (after the final norm, and after
            the output projection where a model has one). A smaller N gives the raw output of block N, and the blocks
            above it are neither built nor run.
        dtype: of weights, computation and states.
        device: where it runs.
        trust_remote_code: run Python code that the directory brings along.

    Raises:
        ConfigError: the directory is missing, not a causal language model, damaged, holds only pickle weights or
            weights that do not fit the model; or `layer` is outside the model.
    """
    directory = Path(path)
    config = check_hf_teacher(directory, layer=layer, trust_remote_code=trust_remote_code)
    num_layers = config.num_hidden_layers
    middle_layer = layer if layer is not None and layer < num_layers else None
    body = _load_body(directory, config, middle_layer, dtype=dtype, trust_remote_code=trust_remote_code)
    description = _describe(directory, body, layer or num_layers, num_layers)
    body.to(device)  # the device alone: rotary frequencies stay in fp32 whatever the weights' dtype
    try:
        teacher = HFTeacher(body, middle_layer, description=description)
        trial = _trial_states(teacher)
    except RUN_ERRORS as error:
        raise config_error(directory, "cannot be run on token ids alone", error) from error
    _check_trial(directory, trial, dtype)
    return teacher


def empty_hf_teacher(
    path: str | Path, *, layer: int | None, dtype: torch.dtype, trust_remote_code: bool = False
) -> Teacher:
    """Build the body that `load_hf_teacher` would load, on the meta device: its config.json alone is read.

    Raises:
        ConfigError: no causal language model's config.json, or no such layer.
    """
    from transformers import AutoModel

    directory = Path(path)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    num_layers = config.num_hidden_layers
    check_layer(directory, layer, num_layers)
    middle_layer = layer if layer is not None and layer < num_layers else None
    if middle_layer is not None:
        _keep_layers(config, middle_layer)
    try:
        with quiet_transformers(), torch.device("meta"):
            body = AutoModel.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            description = _describe(directory, body, layer or num_layers, num_layers)
            return HFTeacher(body, middle_layer, description=description)
    except (*LOAD_ERRORS, *RUN_ERRORS) as error:
        raise config_error(directory, "cannot be built", error) from error


class HFTeacher(Teacher):
    """A `transformers` body whose last hidden state, or the output of whose last built block, is the state."""

    def __init__(self, body: nn.Module, middle_layer: int | None, *, description: str) -> None:
        """Freeze `body`; with `middle_layer` given, it is the number of blocks that were built."""
        self._body = body.eval().requires_grad_(False)
        self._last_block = None if middle_layer is None else _last_block(body, middle_layer)
        self._description = description
        config: Any = body.config
        self._context_length: int | None = getattr(config, "max_position_embeddings", None)
        embedding: Any = body.get_input_embeddings()  # type: ignore[operator]
        self._vocab_size = int(embedding.weight.shape[0])
        # some models look for this id in every batch, which on CUDA waits for the device; no row is padded on the left
        config.pad_token_id = None
        # asked of the model itself: some project the last state to another width than that of their blocks
        self._hidden_size = int(
            self.states(torch.zeros(1, 1, dtype=torch.long, device=self.device)).shape[-1]
        )

    @property
    def hidden_size(self) -> int:
        return self._hidden_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def context_length(self) -> int | None:
        return self._context_length

    @property
    def description(self) -> str:
        return self._description

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the tokens must be."""
        return next(self._body.parameters()).device

    def states(self, tokens: Tensor) -> Tensor:
        """Return the states [n, l, d_t] of `tokens` [n, l]; see `Teacher.states`."""
        # not inference_mode: the loss saves the states for its backward
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            if self._last_block is None:
                return self._body(input_ids=tokens, use_cache=False).last_hidden_state
            outputs: list[Tensor] = []
            hook = self._last_block.register_forward_hook(
                lambda block, inputs, out: outputs.append(_first(out))
            )
            try:
                self._body(input_ids=tokens, use_cache=False)
            finally:
                hook.remove()
            (states,) = outputs
            return states

    def to(self, device: torch.device | str) -> HFTeacher:
        self._body.to(device)
        return self

    def parameters(self) -> Iterator[Tensor]:
        return self._body.parameters()


def _load_body(
    directory: Path,
    config: Any,
    middle_layer: int | None,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> nn.Module:
    """Build the body with blocks 1 to `middle_layer` (None: all) and fill it from the directory's weights."""
    from transformers import AutoModel

    if middle_layer is not None:
        _keep_layers(config, middle_layer)
    try:
        with quiet_transformers():
            body, report = AutoModel.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        raise config_error(directory, "cannot be loaded", error) from error
    _check_report(directory, body, report, middle_layer)
    return body


def _keep_layers(config: Any, num_layers: int) -> None:
    """Make `config` that of a model with the first `num_layers` blocks."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        config.layer_types = layer_types[:num_layers]
    config.num_hidden_layers = num_layers


def _check_report(directory: Path, body: Any, report: dict[str, Any], middle_layer: int | None) -> None:
    """Refuse a checkpoint that leaves weights of the body unset or has weights that the body has no place for."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise config_error(
            directory,
            f"lacks {len(missing)} of the model's weights, among them {missing[0]}: not this model's file",
        )
    mismatched = sorted(str(entry) for entry in report["mismatched_keys"])
    if mismatched:
        raise config_error(
            directory, f"holds weights of another shape than config.json says: {mismatched[0]}"
        )
    surplus = sorted(key for key in report["unexpected_keys"] if _is_in_body(key, body, middle_layer))
    if surplus:
        raise config_error(
            directory,
            f"holds {len(surplus)} weights that config.json gives no place, among them {surplus[0]}",
        )


def _is_in_body(key: str, body: Any, middle_layer: int | None) -> bool:
    """Return whether an unused weight belongs to the body: not to the LM head, nor to a block left out on purpose."""
    prefix = f"{body.base_model_prefix}."
    name = key.removeprefix(prefix)
    children = {child for child, _ in body.named_children()}
    if not key.startswith(prefix) and name.split(".")[0] not in children:
        return False
    if middle_layer is None:
        return True
    block_list = _block_list_name(body, middle_layer)
    index = name.removeprefix(f"{block_list}.").split(".")[0]
    is_left_out = name.startswith(f"{block_list}.") and index.isdecimal() and int(index) >= middle_layer
    return not is_left_out


def _block_list_name(body: nn.Module, num_layers: int) -> str:
    """Return the name of the list of transformer blocks: the outermost module list of that length."""
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name
    raise ConfigError(
        f"--let-teacher-layer {num_layers}: {type(body).__name__} keeps its blocks in no list that we know; "
        "only its last layer can be used"
    )


def _last_block(body: nn.Module, num_layers: int) -> nn.Module:
    blocks = body.get_submodule(_block_list_name(body, num_layers))
    assert isinstance(blocks, nn.ModuleList), "found by its type"
    return blocks[-1]


def _first(output: Any) -> Tensor:
    """Return a block's hidden states: its output, or the first entry of it in some families."""
    return output[0] if isinstance(output, tuple) else output


def _trial_states(teacher: HFTeacher) -> Tensor:
    """Return the states [2, l, d_t] of two short rows that differ in their last token only, in fp32."""
    length = min(4, teacher.context_length or 4)
    rows = torch.zeros(2, length, dtype=torch.long, device=teacher.device)
    rows[1, -1] = min(1, teacher.vocab_size - 1)
    return teacher.states(rows).float()


def _check_trial(directory: Path, trial: Tensor, dtype: torch.dtype) -> None:
    """Refuse a model whose states are not finite, or, as in an encoder, depend on later tokens."""
    if not torch.isfinite(trial).all():
        raise config_error(
            directory,
            f"gives states that are not finite in {dtype}: its weights are damaged, or too large for that "
            "--let-teacher-dtype",
        )
    first, second = trial[:, :-1].unbind()
    # equal to the last bit as a rule; 1e-3 leaves room for kernels that treat the rows of a batch differently
    if bool(((first - second).abs() > 1e-3 * trial.abs().max()).any()):
        raise config_error(
            directory, "is no causal language model: a token's state depends on the tokens after it"
        )


def _describe(directory: Path, body: nn.Module, layer: int, num_layers: int) -> str:
    num_parameters = sum(parameter.numel() for parameter in body.parameters())
    dtype = str(next(body.parameters()).dtype).removeprefix("torch.")
    return f"{directory} ({type(body).__name__}, layer {layer} of {num_layers}, {num_parameters:,} weights, {dtype})"
