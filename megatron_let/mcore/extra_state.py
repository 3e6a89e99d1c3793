"""Look at what Transformer Engine will unpickle: it keeps a module's FP8 state as a pickle in a tensor of bytes.

Without FP8 that tensor is empty. Source of what it holds: get_extra_state and set_extra_state of
TransformerEngineBaseModule, and common/recipe, of Transformer Engine 2.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_let.mcore.safe_pickle import (
    GETATTR,
    Enumeration,
    Member,
    Record,
    Refused,
    read_pickle,
    refusals,
)


class _Recipe(Record):
    """A recipe, or the options in it: made without arguments and then given plain values by name."""

    __slots__ = ()

    def check_args(self) -> None:
        if self.args:
            raise Refused("makes an FP8 recipe in a way of its own")

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if type(state) is not dict or any(type(key) is not str or key.startswith("__") for key in state):
            raise Refused("gives an FP8 recipe other than named values")
        _check_values(state)


class _Value(Record):
    """What is made by one call and then left alone."""

    __slots__ = ()

    def check_args(self) -> None:
        _check_values(self.args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("changes a value after it was made")


class _Storage(_Value):
    """A tensor's numbers, which torch keeps as a file of its own within the pickle."""

    __slots__ = ()

    def check_args(self) -> None:
        if len(self.args) != 1 or type(self.args[0]) is not bytes:
            raise Refused("holds a tensor in a way of its own")
        torch.load(io.BytesIO(self.args[0]), map_location="cpu", weights_only=True)


class _Format(_Value, Enumeration):
    """A choice of number types."""

    __slots__ = ()


_RECIPES = """
    DelayedScaling Float8CurrentScaling MXFP8BlockScaling Float8BlockScaling NVFP4BlockScaling MMParams QParams
"""
_PLACE = "transformer_engine.common.recipe"
_NAMES: Mapping[tuple[str, str], Any] = {
    **{(_PLACE, name): type(name, (_Recipe,), {"__slots__": ()}) for name in _RECIPES.split()},
    (_PLACE, "Format"): _Format,
    GETATTR: Member,
    (_PLACE, "_FormatHelper"): _Value,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("torch._utils", "_rebuild_tensor_v2"): _Value,
    ("collections", "OrderedDict"): _Value,
}


def take_unsaved(chunk: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """Take out of `chunk`, a model chunk's sharded state, the extra states that a checkpoint lacks; return their values.

    Other layers have other ones: Transformer Engine's norms do, the stock ones do not. Their module keeps its own.

    stored: names in the checkpoint, those of objects with their shard.
    """
    unsaved = [
        name
        for name, value in chunk.items()
        if name.endswith("_extra_state")
        and isinstance(value, ShardedObject)
        and value.unique_key not in stored
    ]
    return {name: chunk.pop(name).data for name in unsaved}


def check_extra_states(chunks: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Refuse extra states of modules that would run code when their modules take them.

    chunks: name -> value of each model chunk, as it is about to load them.

    Raises:
        ConfigError: one of them does; or is no pickle of an FP8 state.
    """
    for name, value in (item for chunk in chunks for item in chunk.items()):
        if not name.endswith("_extra_state") or not isinstance(value, torch.Tensor) or value.numel() == 0:
            continue
        with refusals(directory, name):
            if value.dtype is not torch.uint8:
                raise Refused("holds other numbers than bytes")
            data = value.detach().cpu().contiguous().numpy().tobytes()
            _check_values([read_pickle(data, _NAMES)])


def _check_values(values: Any) -> None:
    """Refuse a function or class as a value: whoever takes it might call it."""
    todo = [values]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if isinstance(value, type):
            raise Refused("holds a function where a value belongs")
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)
