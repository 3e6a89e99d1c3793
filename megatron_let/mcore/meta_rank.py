"""One rank of a run of any size on the meta device: the program's own modules, with shapes and without memory.

    with meta_rank(config, rank=5, world_size=32, is_on_gpu=True) as context:
        student = build_student(config, context, ...)

Collectives and messages go through torch's fake process group, which does nothing, so that modules, optimizer and
pipeline schedule of one rank run alone. Values do not exist; sizes and what is kept for backward do.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_let.config.run_config import RunConfig
from megatron_let.mcore import stock_layers
from megatron_let.mcore.cpu_backend import cuda_calls_on
from megatron_let.mcore.model import Student
from megatron_let.mcore.parallel import (
    ParallelContext,
    current_context,
    model_parallel_groups,
    seed_everything,
)
from megatron_let.mcore.stock_kernels import stock_kernels
from megatron_let.mcore.stock_layers import SdpaCoreAttention

META = torch.device("meta")


@dataclass(frozen=True)
class MetaContext(ParallelContext):
    """A rank that is thought of; `for_gpu`: its layers and kernels are those of a GPU."""

    for_gpu: bool = True

    @property
    def is_on_gpu(self) -> bool:
        """Return whether the rank stands for one with a GPU."""
        return self.for_gpu


def plain_layers(config: RunConfig, *, is_on_gpu: bool) -> RunConfig:
    """Return `config` with layers that can be built on any machine, and with nothing that looks at values.

    Transformer Engine's layers and a GPU's own kernels need a GPU: the stock ones have the same parameters and keep nearly
    the same for backward. Weights are drawn as ever, on the meta device at no cost: that marks which of them are sharded.
    """
    given = config.transformer
    transformer = dataclasses.replace(
        given,
        fp8=None,
        fp8_param=False,
        first_last_layers_bf16=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False if is_on_gpu else given.gradient_accumulation_fusion,
        cross_entropy_loss_fusion=given.cross_entropy_loss_fusion and given.cross_entropy_fusion_impl != "te",
    )
    model = dataclasses.replace(config.model, transformer_impl="local")
    ddp = dataclasses.replace(
        config.ddp,
        fp8_param_gather=False,
        reuse_grad_buf_for_mxfp8_param_ag=False,
        check_for_nan_in_grad=False,
        check_for_large_grads=False,
    )
    optimizer = dataclasses.replace(config.optimizer, reuse_grad_buf_for_mxfp8_param_ag=False)
    return dataclasses.replace(config, transformer=transformer, model=model, ddp=ddp, optimizer=optimizer)


class SharedSequenceAttention(SdpaCoreAttention):
    """Attention of a context-parallel rank, by its sizes: like Transformer Engine's it keeps its own share for backward.

    Keys and values of the other shares pass by; whoever counts FLOPs must know of them.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)


def forget_rotary_angles() -> None:
    """Have the next forward pass make the angles of its positions anew: megatron-core keeps those that it has made."""
    RotaryEmbedding.forward.cache_clear()


class _Done:
    """Work that nobody waits for."""

    def wait(self) -> None:
        """Return at once."""


@contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[_Done]:
    yield _Done()


@contextmanager
def meta_rank(config: RunConfig, *, rank: int, world_size: int, is_on_gpu: bool) -> Iterator[MetaContext]:
    """Stand on `rank` of `world_size` without any other process; nothing may be a part of a process group already.

    The random states of Python, NumPy and torch are put back on leaving.
    """
    import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"

    with ExitStack() as stack:
        stack.enter_context(cuda_calls_on("meta"))
        stack.enter_context(stock_kernels(is_on_gpu=is_on_gpu))
        # What torch sends as one, the fake backend cannot: messages are done when asked for, the others go one by one.
        stack.enter_context(patch.object(dist, "batch_isend_irecv", lambda _: []))
        stack.enter_context(patch.object(param_and_grad_buffer, "_coalescing_manager", _one_by_one))
        if config.transformer.context_parallel_size > 1:
            stack.enter_context(patch.object(stock_layers, "SdpaCoreAttention", SharedSequenceAttention))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(
            patch.object(sys, "excepthook", sys.excepthook)
        )  # torch's names the rank, for good
        dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(model_parallel_groups(config))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        seed_everything(config)
        described = current_context(META, vp_size=config.transformer.virtual_pipeline_model_parallel_size)
        values = {item.name: getattr(described, item.name) for item in dataclasses.fields(described)}
        yield MetaContext(**values, for_gpu=is_on_gpu)


@dataclass(frozen=True)
class RankSizes:
    """What one rank holds before it trains: parameters in numbers, the rest in bytes."""

    parameters: int
    whole_parameters: int
    """With the shards of tensor-parallel ranks put together; a tied output layer counts where the embedding is."""

    weights: int
    gradients: int
    optimizer: int


def sizes_of_rank(student: Student, optimizer: MegatronOptimizer, tp_size: int) -> RankSizes:
    """Return the sizes of a built student and optimizer; of Adam's moments too, which its first step makes."""
    parameters = [parameter for chunk in student.chunks for parameter in chunk.parameters()]
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_weights = _storages(parameters)
    config = optimizer.config
    num_moments = 2 if config.optimizer == "adam" else int(config.sgd_momentum != 0)
    moments = sum(parameter.numel() * parameter.element_size() for parameter in stepped) * num_moments
    main = sum(size for key, size in _storages(stepped).items() if key not in of_weights)
    return RankSizes(
        parameters=sum(parameter.numel() for parameter in parameters),
        whole_parameters=sum(
            parameter.numel() * (tp_size if getattr(parameter, "tensor_model_parallel", False) else 1)
            for parameter in parameters
            if not getattr(parameter, "shared", False)
        ),
        weights=sum(of_weights.values()),
        gradients=sum(_storages(gradient_buffers(student)).values()),
        optimizer=main + moments,
    )


def gradient_buffers(student: Student) -> list[torch.Tensor]:
    """Return the tensors that gradients are added up in."""
    return [
        buffer.grad_data
        for chunk in student.chunks
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the memory behind tensors: its key and its size in bytes."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
