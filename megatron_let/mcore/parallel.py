"""Process groups, ranks and seeds of a run, as one frozen object."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import megatron.core
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

import megatron_let
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError, LetError
from megatron_let.mcore.meeting import Watch, process_group, unwatched
from megatron_let.mcore.stock_kernels import stock_kernels

Value = TypeVar("Value")

_DETERMINISTIC_LIBRARIES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@dataclass(frozen=True)
class ParallelContext:
    """Where this process stands: rank and size along every parallel dimension, and the groups themselves."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    vp_size: int | None
    device: torch.device
    groups: ProcessGroupCollection
    local_rank: int = 0
    """This rank's number on its node."""

    @property
    def is_on_gpu(self) -> bool:
        """Return whether tensors of this run live on a GPU."""
        return self.device.type == "cuda"

    def is_first_chunk(self, vp_stage: int | None) -> bool:
        """Return whether model chunk `vp_stage` of this rank holds the embedding."""
        return self.pp_rank == 0 and (vp_stage or 0) == 0

    def is_last_chunk(self, vp_stage: int | None) -> bool:
        """Return whether model chunk `vp_stage` of this rank holds the LM head."""
        return self.pp_rank == self.pp_size - 1 and (vp_stage is None or vp_stage == (self.vp_size or 1) - 1)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` in place over every rank of the run."""
        dist.all_reduce(tensor)
        return tensor

    def sum_over_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` in place over the ranks of this pipeline stage, which alone call this."""
        dist.all_reduce(tensor, group=self.groups.dp_cp)
        dist.all_reduce(tensor, group=self.groups.tp)
        return tensor

    def from_first_tensor_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill `tensor` with that of the first tensor-parallel rank; every rank of that group calls this."""
        if self.tp_size > 1:
            dist.broadcast(tensor, dist.get_global_rank(self.groups.tp, 0), group=self.groups.tp)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on at least one rank; every rank must call this."""
        vote = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())

    def gather(self, value: Value) -> list[Value]:
        """Return the value of every rank, in rank order; every rank must call this."""
        return _gathered(value)

    def from_rank_0(self, value: Value) -> Value:
        """Return rank 0's value on every rank; every rank must call this."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        # NCCL warns when it has to guess the device.
        dist.barrier(device_ids=[self.device.index] if self.is_on_gpu else None)

    def raise_together(self, error: LetError | None) -> None:
        """Raise on every rank the first error that any rank brings; every rank must call this.

        Raises:
            LetError: the error of the lowest rank that has one, of its kind.
        """
        for first in self.gather(None if error is None else (type(error), str(error))):
            if first is not None:
                raise first[0](first[1])

    def together(self, action: Callable[[], Value]) -> Value:
        """Return what `action` gives on this rank, or fail on every rank when it fails on any; all must call this.

        For what the user gave: a file that one rank cannot use (OSError) is a mistake to correct, like any other.

        Raises:
            LetError: the error of the lowest rank that has one.
        """
        outcome: list[Value] = []
        error: LetError | None = None
        try:
            outcome.append(action())
        except LetError as mistake:
            error = mistake
        except OSError as problem:
            error = ConfigError(f"{problem.filename or 'a file'}: {problem.strerror or problem}")
        self.raise_together(error)
        return outcome[0]

    def on_rank_0(self, action: Callable[[], Value]) -> Value:
        """Return on every rank what `action` gives on rank 0, which alone runs it; all must call this.

        Raises:
            LetError: it failed there.
        """
        mine = self.together(lambda: [action()] if self.rank == 0 else [])
        return self.from_rank_0(mine)[0]


def choose_backend(config: RunConfig) -> str:
    """Return `nccl` on a machine with a GPU, `gloo` without one, or what `--distributed-backend` asks for.

    Raises:
        ConfigError: NCCL was asked for on a machine without a GPU, or gloo on one with a GPU.
    """
    has_gpu = torch.cuda.is_available()
    backend = config.parallel.distributed_backend or ("nccl" if has_gpu else "gloo")
    if backend == "nccl" and not has_gpu:
        raise ConfigError(
            "--distributed-backend nccl needs a GPU and none is visible; use gloo to run on CPU"
        )
    if backend == "gloo" and has_gpu:
        raise ConfigError(
            "--distributed-backend gloo is the CPU backend; on a GPU use nccl (hide the GPU to run on CPU)"
        )
    return str(backend)


@contextmanager
def parallel_context(config: RunConfig, watch: Watch = unwatched) -> Iterator[ParallelContext]:
    """Join the process group torchrun describes, lay out the model-parallel groups, seed, and clean up on leaving.

    `watch` goes on meanwhile, from before this rank waits for another. A process group that exists already (tests) is used
    and left as it is.
    """
    backend = choose_backend(config)
    with ExitStack() as stack:
        if backend == "gloo":
            from megatron_let.mcore.cpu_backend import cpu_backend

            stack.enter_context(cpu_backend())
        stack.enter_context(stock_kernels())
        if config.transformer.deterministic_mode:
            stack.enter_context(_deterministic_algorithms())
        device = _select_device(backend)
        timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
        stack.enter_context(process_group(backend, timeout, watch))
        _require_same_settings(config)
        stack.enter_context(model_parallel_groups(config))
        seed_everything(config)
        yield current_context(device, vp_size=config.transformer.virtual_pipeline_model_parallel_size)


def seed_everything(config: RunConfig) -> None:
    """Seed Python, NumPy, torch and Megatron's tensor-parallel RNG tracker by Megatron's rule."""
    seed = config.training.seed + 100 * mpu.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _select_device(backend: str) -> torch.device:
    if backend == "gloo":
        return torch.device("cpu")
    local_rank = _local_rank()
    # All ranks of the machine find this, not only those that are one too many.
    wanted, visible = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)), torch.cuda.device_count()
    if wanted > visible:
        raise ConfigError(
            f"{wanted} ranks were started on a machine with {visible} visible GPUs; start one rank a GPU "
            f"(--nproc-per-node {visible}; under Slurm let every rank see all GPUs of its node: --gpus-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Let torch refuse kernels whose result varies, and tell cuBLAS, NCCL and Transformer Engine likewise.

    Their variables are read when a GPU is first used; what the user has set stays.
    """
    for name, value in _DETERMINISTIC_LIBRARIES.items():
        os.environ.setdefault(name, value)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _require_same_settings(config: RunConfig) -> None:
    """Raise ConfigError on every rank when one was started with other settings, which would end in a hang.

    Where logs and index caches are may differ from machine to machine.
    """
    mine = {"program": _versions(), **config.to_dict()}
    mine["data"].pop("data_cache_path")
    for name in ("tensorboard_dir", "wandb_save_dir"):
        mine["logging"].pop(name)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
    if len(set(_gathered(digest))) == 1:
        return
    everyone = _gathered(mine)
    hosts = _gathered(socket.gethostname())
    for rank, other in enumerate(everyone):
        different = [
            f"{name} {other.get(section, {}).get(name)} (rank 0: {value})"
            for section, values in everyone[0].items()
            for name, value in values.items()
            if other.get(section, {}).get(name) != value
        ]
        if different:
            raise ConfigError(
                f"rank {rank} was started with other settings than rank 0: {', '.join(different[:8])} on "
                f"{hosts[rank]}; start all alike, with the same software"
            )


def _versions() -> dict[str, str]:
    """Return the versions of what computes: another one on some rank gives other numbers there."""
    return {
        "megatron_let": megatron_let.__version__,
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
        "numpy": np.__version__,
    }


def _gathered(value: Value) -> list[Value]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def model_parallel_groups(config: RunConfig) -> Iterator[None]:
    """Lay out megatron-core's model-parallel groups over the process group that is there."""
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.transformer.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.transformer.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.transformer.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.transformer.context_parallel_size,
        distributed_timeout_minutes=config.parallel.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        mpu.destroy_model_parallel()


def current_context(device: torch.device, *, vp_size: int | None) -> ParallelContext:
    """Return where this process stands in the model-parallel groups that megatron-core has laid out already."""
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=mpu.get_context_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        vp_size=vp_size,
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        local_rank=_local_rank(),
    )
