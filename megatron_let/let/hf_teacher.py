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

from megatron_let.let.hf_blocks import BlockRunner, body_of, drop_blocks, find_blocks
from megatron_let.let.hf_files import check_safetensors, config_error, read_config
from megatron_let.let.hf_head import HFHead
from megatron_let.let.hf_model import LOAD_ERRORS, build_empty, load_model
from megatron_let.let.hf_sizes import check_sizes
from megatron_let.let.teacher import Teacher, check_layer

RUN_ERRORS = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)
"""What a model raises that needs more than token ids; a device out of memory is not among them."""

# What configurations call the longest row that a model reads, the usual name first; transformers gives many of the
# others that name too.
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)


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
            the output projection where a model has one). A smaller N gives the raw output of block N, computed as in
            the whole model, and the blocks above it are neither loaded nor run.
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
    model, has_head = load_model(
        directory, config, middle_layer, dtype=dtype, trust_remote_code=trust_remote_code
    )
    body = body_of(model)
    description = _describe(directory, body, layer or num_layers, num_layers)
    body.to(device)  # the device alone: rotary frequencies stay in fp32 whatever the weights' dtype
    head = HFHead(model) if has_head and middle_layer is None else None
    try:
        teacher = HFTeacher(body, middle_layer, description=description, head=head)
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
    directory = Path(path)
    config = read_config(directory, trust_remote_code=trust_remote_code)
    num_layers = config.num_hidden_layers
    check_layer(directory, layer, num_layers)
    middle_layer = layer if layer is not None and layer < num_layers else None
    try:
        model = build_empty(config, dtype=dtype, trust_remote_code=trust_remote_code)
        if middle_layer is not None:
            drop_blocks(model, num_layers, middle_layer)
        body = body_of(model)
        description = _describe(directory, body, layer or num_layers, num_layers)
        return HFTeacher(body, middle_layer, description=description)
    except (*LOAD_ERRORS, *RUN_ERRORS) as error:
        raise config_error(directory, "cannot be built", error) from error


class HFTeacher(Teacher):
    """A `transformers` body whose last hidden state, or the output of whose last built block, is the state."""

    def __init__(
        self, body: nn.Module, middle_layer: int | None, *, description: str, head: HFHead | None = None
    ) -> None:
        """Freeze `body`; with `middle_layer` given, it is the number of blocks that are left of it.

        Raises:
            ConfigError: the body has no such blocks, or does not run them one after the other.
        """
        self._body = body.eval().requires_grad_(False)
        self._blocks = None if middle_layer is None else BlockRunner(body, find_blocks(body, middle_layer)[1])
        self._description = description
        self._head = head
        config: Any = body.config
        self._context_length = _context_length(config)
        embedding: Any = body.get_input_embeddings()  # type: ignore[operator]
        self._vocab_size = int(embedding.weight.shape[0])
        # some models look for this id in every batch, which on CUDA waits for the device; no row is padded on the left
        config.pad_token_id = None
        # asked of the model itself: some project the last state to another width than that of their blocks
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._hidden_size = int(self.states(token).shape[-1])
        if self._blocks is not None:
            self._blocks.check_order(token)

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
            if self._blocks is not None:
                return self._blocks.states(tokens)
            states: Tensor = self._body(input_ids=tokens, use_cache=False).last_hidden_state
            return states

    def take_lm_head(self) -> HFHead | None:
        head, self._head = self._head, None
        return head

    def to(self, device: torch.device | str) -> HFTeacher:
        self._body.to(device)
        return self

    def parameters(self) -> Iterator[Tensor]:
        return self._body.parameters()


def _context_length(config: Any) -> int | None:
    """Return the longest row that a model says it reads, None where it names none."""
    limits = (getattr(config, name, None) for name in _CONTEXT_NAMES)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


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
