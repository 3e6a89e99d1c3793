"""A Megatron checkpoint of this project as a LET teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.let import Teacher
from megatron_let.let.own_loss import LmHead
from megatron_let.let.teacher import check_layer
from megatron_let.mcore.checkpoint import RUN, load_common
from megatron_let.mcore.frozen_gpt import FrozenGpt, load_frozen_gpt, read_head
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.settings import CORE_SECTIONS
from megatron_let.plain_json import fits, shown
from megatron_let.training.checkpoint_files import find_damage, newest_iteration_directory
from megatron_let.training.saved_values import incomplete, require_vocabulary


class MegatronTeacher(Teacher):
    """The un-sharded body of a checkpointed GPT."""

    def __init__(
        self,
        gpt: FrozenGpt,
        *,
        vocab_size: int,
        description: str,
        read_head: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        """`read_head` gives the LM head's weight [ids, h], read when it is needed and not before."""
        self._gpt = gpt
        self._vocab_size = vocab_size
        self._description = description
        self._read_head = read_head

    @property
    def hidden_size(self) -> int:
        """See Teacher."""
        return self._gpt.hidden_size

    @property
    def vocab_size(self) -> int:
        """See Teacher; padding ids do not count."""
        return self._vocab_size

    @property
    def context_length(self) -> int | None:
        """See Teacher; the sequence length it was trained on, or its learned positions."""
        return self._gpt.context_length

    @property
    def description(self) -> str:
        """See Teacher."""
        return self._description

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """See Teacher."""
        return self._gpt.states(tokens)

    def take_lm_head(self) -> LmHead | None:
        """See Teacher."""
        read, self._read_head = self._read_head, None
        if read is None:
            return None

        @cache
        def weight(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
            return read()[: self._vocab_size].to(device, dtype)  # ids that are padding have no probability

        return lambda states, tokens: functional.linear(states, weight(states.device, states.dtype))

    def to(self, device: torch.device | str) -> MegatronTeacher:
        """See Teacher."""
        self._gpt.model.to(device)
        return self

    def parameters(self) -> Iterator[torch.Tensor]:
        """See Teacher."""
        return self._gpt.model.parameters()


def check_megatron_teacher(path: Path, *, layer: int | None) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint under `path` and what it says of its run, without reading its weights.

    Raises:
        ConfigError: no checkpoint, one of another program, or no such layer.
    """
    directory = newest_iteration_directory(path)
    damage = find_damage(directory)
    if damage is not None:
        raise ConfigError(f"teacher checkpoint {directory} is damaged: {damage}")
    run = load_common(directory).get(RUN)
    if run is None:
        raise ConfigError(f"teacher checkpoint {directory} was not written by megatron_let; convert it first")
    try:
        require_vocabulary(run)
        num_layers = RunConfig.from_dict(run["config"], CORE_SECTIONS).transformer.num_layers
        if not fits(num_layers, int):
            raise ValueError(f"num_layers is {shown(num_layers)}")
    except (KeyError, ValueError, ConfigError) as error:
        raise incomplete(directory, error) from error
    check_layer(directory, layer, num_layers)
    return directory, run


def load_megatron_teacher(
    path: Path, *, layer: int | None, dtype: torch.dtype, context: ParallelContext
) -> MegatronTeacher:
    """Load the newest checkpoint under `path`, whatever layout it was trained on.

    Raises:
        ConfigError: no checkpoint, a damaged one, one of another program, or no such layer.
    """
    directory, run = check_megatron_teacher(path, layer=layer)
    gpt = load_frozen_gpt(directory, run["config"], layer=layer, dtype=dtype, device=context.device)
    shown = f"{directory} (layer {layer or 'last'}, width {gpt.hidden_size})"
    teacher = MegatronTeacher(
        gpt,
        vocab_size=int(run["vocab_size"]),
        description=shown,
        read_head=(lambda: read_head(directory)) if gpt.has_last_states else None,
    )
    if teacher.vocab_size > gpt.num_ids:
        raise ConfigError(
            f"teacher checkpoint {directory} says that it knows {teacher.vocab_size} ids and embeds {gpt.num_ids}"
        )
    first_ids = torch.arange(min(2, teacher.vocab_size), device=context.device)[None]
    if not bool(torch.isfinite(teacher.states(first_ids)).all()):
        raise ConfigError(
            f"teacher {directory} gives states that are not finite in {dtype}: its weights are damaged, or too large for "
            "that --let-teacher-dtype"
        )
    return teacher
