"""What a checkpoint holds, and how it is read through megatron-core's torch_dist format on any parallel layout.

Where checkpoints live and which one is whole is decided in `training/checkpoint_files.py`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_let.errors import ConfigError
from megatron_let.mcore.checkpoint_reader import (
    CheckpointReader,
    first_failure,
    load_strategy,
    no_code_on_load,
)
from megatron_let.mcore.dcp_metadata import read_metadata
from megatron_let.mcore.extra_state import check_extra_states, take_unsaved
from megatron_let.mcore.model import Student
from megatron_let.mcore.optimizer_state import load_optimizer, optimizer_state
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.safe_pickle import Refused, refusals
from megatron_let.mcore.torch_file import load_torch_file
from megatron_let.plain_json import read_json
from megatron_let.regular_files import open_regular

# Keys of the small, unsharded part; Megatron-LM uses the first two likewise.
ITERATION = "iteration"
SCHEDULER = "opt_param_scheduler"
RUN = "megatron_let"

# The one format that is read: what metadata.json must say.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Parts:
    """Everything trainable that a checkpoint covers; None leaves a part out."""

    student: Student
    optimizer: MegatronOptimizer | None
    scheduler: OptimizerParamScheduler | None
    with_rng: bool


def load_common(directory: Path) -> dict[str, Any]:
    """Return the small unsharded part of a checkpoint: iteration, scheduler state and the `run` values.

    Raises:
        ConfigError: it is no torch_dist checkpoint, or that part cannot be read.
    """
    missing = [name for name in ("metadata.json", "common.pt") if not (directory / name).is_file()]
    if missing:
        raise ConfigError(f"checkpoint {directory} cannot be read: it has no {' and no '.join(missing)}")
    with refusals(directory / "metadata.json"):
        if read_json(directory / "metadata.json") != _FORMAT:
            raise Refused("names another format than torch_dist")
    path = directory / "common.pt"
    with refusals(path), open_regular(path) as stream:
        common = load_torch_file(stream)
        if type(common) is not dict or type(common.get(RUN, {})) is not dict:
            raise Refused("holds something else than a table of values")
        return common


def load_content(directory: Path, parts: Parts, context: ParallelContext) -> None:
    """Load `parts` from a checkpoint that may have been written on another layout; every rank calls this.

    The scheduler is not touched: its rules for changed settings live with the trainer. RNG states are per layout:
    they load only when tensor and pipeline sizes are those of the checkpoint (the caller asks for them then).

    Raises:
        ConfigError: the checkpoint does not fit the model.
    """
    metadata = content_metadata(context)
    wanted = sharded_parts(parts, context, metadata, is_loading=True)
    common = context.together(lambda: load_common(directory))
    stored = context.on_rank_0(lambda: read_metadata(directory))
    chunks = parts.student.gpt_chunks
    names = _model_keys(len(chunks))
    unsaved = {name: take_unsaved(wanted[name], stored.state_dict_metadata) for name in names}
    strategy = FullyParallelLoadStrategyWrapper(load_strategy(), context.groups.dp_cp)
    try:
        with no_code_on_load(directory, stored, common) as common_strategy:
            loaded = dist_checkpointing.load(wanted, str(directory), strategy, common_strategy)
    except CheckpointException as error:
        raise first_failure(error, f"checkpoint {directory} does not fit this model") from error
    except (dist_checkpointing.mapping.CheckpointingException, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"checkpoint {directory} does not fit this model: {_first_line(error)}") from error
    context.together(lambda: check_extra_states([loaded[name] for name in names], directory))
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict({**loaded[name], **unsaved[name]})
    if parts.optimizer is not None:
        optimizer = parts.optimizer
        context.together(lambda: _load_optimizer(optimizer, loaded["optimizer"], directory))
    if parts.with_rng:
        context.together(lambda: _restore_rng_state(loaded["rng_state"], directory))


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any], directory: Path) -> None:
    try:
        load_optimizer(optimizer, state)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"checkpoint {directory} holds an optimizer state that this run's optimizer cannot take "
            f"({_first_line(error)}); give the settings it was trained with, or --no-load-optim"
        ) from error


def stored_entries(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Return name -> shape and type of every tensor in a checkpoint; layers are stacked along a first dimension.

    Raises:
        ConfigError: what the checkpoint says of itself is damaged, or is not safe to read.
    """
    entries = read_metadata(directory).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(directory: Path, entries: Mapping[str, TensorStorageMetadata]) -> dict[str, torch.Tensor]:
    """Read these tensors whole, on this rank alone: no communication, whatever layout wrote them.

    Raises:
        ConfigError: they are damaged, or are not safe to read.
    """
    reader = CheckpointReader(directory, read_metadata(directory))
    wanted = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as intended
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise first_failure(error, f"checkpoint {directory} cannot be read") from error
    return wanted


def sharded_parts(
    parts: Parts, context: ParallelContext, metadata: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Return `parts` as megatron-core's sharded state, which says which rank has what; every rank calls this."""
    chunks = parts.student.gpt_chunks
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_model_keys(len(chunks)), chunks, strict=True)
    }
    if parts.optimizer is not None:
        state["optimizer"] = optimizer_state(parts.optimizer, state, metadata, is_loading=is_loading)
    if parts.with_rng:
        state["rng_state"] = ShardedObject(
            "rng_state",
            [_rng_state()],
            (context.pp_size, context.tp_size),
            (context.pp_rank, context.tp_rank),
            replica_id=context.dp_rank * context.cp_size + context.cp_rank,
        )
    return state


def _model_keys(num_chunks: int) -> list[str]:
    return ["model"] if num_chunks == 1 else [f"model{index}" for index in range(num_chunks)]


def content_metadata(context: ParallelContext) -> dict[str, Any]:
    """Return what megatron-core wants to know of the form that the content takes."""
    return {
        # The one optimizer format that loads on any tensor-, pipeline- and data-parallel size.
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": context.groups.dp_cp,
    }


def plain_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what of it is stored with the content."""
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"}


def _rng_state() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }


def _restore_rng_state(states: Any, directory: Path) -> None:
    try:
        _set_rng_state(states[0])
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"checkpoint {directory} holds random states that cannot be used ({_first_line(error)}); give --no-load-rng"
        ) from error


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
