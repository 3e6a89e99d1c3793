"""A loop with the signatures of Megatron-LM core_v0.16.1: what pretrain_gpt.py finds there, and that program itself.

Data stand on the first tensor-parallel rank of the first and the last stage alone, batches are broadcast from there,
middle stages read none, losses come as (sum, count, report), evaluation is told by `model.eval()`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model, get_model_config

ARGS: list[argparse.Namespace] = []


def get_args() -> argparse.Namespace:
    """Return the arguments of the run."""
    return ARGS[0]


def get_tokenizer() -> argparse.Namespace:
    """Return the tokenizer of the run, as far as it counts here."""
    return argparse.Namespace(vocab_size=get_args().vocab_size)


WRITERS: list[Any] = []


def get_tensorboard_writer() -> Any:
    """Return the writer, on the last rank alone."""
    return WRITERS[0] if WRITERS and dist.get_rank() == dist.get_world_size() - 1 else None


def get_wandb_writer() -> None:
    """Return that there is none."""


def pretrain(
    train_valid_test_dataset_provider: Callable[..., Any],
    model_provider: Callable[..., Any],
    model_type: Any,
    forward_step_func: Callable[..., Any],
    process_non_loss_data_func: Any = None,
    extra_args_provider: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None = None,
    args_defaults: dict[str, Any] | None = None,
    *,
    words: list[str],
    setup_optimizer: Callable[[list[Any]], tuple[Any, Any]],
) -> list[Any]:
    """Train and return the model chunks. What Megatron-LM takes from the process and builds itself stands last."""
    parser = argparse.ArgumentParser()
    if extra_args_provider is not None:
        parser = extra_args_provider(parser)
    ARGS[:] = [argparse.Namespace(**(args_defaults or {}), **vars(parser.parse_args(words)))]
    args = get_args()
    model = get_model(model_provider, model_type)
    optimizer, scheduler = setup_optimizer(model)
    stages: list[int | None] = [None] if len(model) == 1 else list(range(len(model)))
    iterators = [train_valid_test_dataset_provider(vp_stage=stage) for stage in stages]
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    for chunk in model:
        chunk.train()
    for iteration in range(args.iteration, args.train_iters):
        args.curr_iteration = iteration
        _train_step(forward_step_func, iterators, model, optimizer, scheduler)
        _evaluate(forward_step_func, model, train_valid_test_dataset_provider, stages)
    return model


def get_model(model_provider_func: Callable[..., Any], model_type: Any) -> list[Any]:
    """Build this rank's model chunks and wrap them."""
    args, groups = get_args(), ProcessGroupCollection.use_mpu_process_groups()
    vp_size = args.virtual_pipeline_model_parallel_size
    model = []
    for stage in range(vp_size or 1):
        first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
        places: dict[str, Any] = {"pre_process": first, "post_process": last}
        if vp_size is not None:
            places = {
                "pre_process": first and stage == 0,
                "post_process": last and stage == vp_size - 1,
                "vp_stage": stage,
            }
        chunk = model_provider_func(**places, config=None, pg_collection=groups)
        chunk.model_type = model_type
        model.append(chunk)
    for chunk in model:
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    config = get_model_config(model[0])
    if args.fp16 or args.bf16:
        model = [Float16Module(config, chunk) for chunk in model]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.bf16, check_for_nan_in_grad=True, use_distributed_optimizer=False
    )
    return [
        DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(model)
    ]


def _schedule(forward_step_func: Any, iterators: Any, model: list[Any], *, forward_only: bool) -> None:
    args, is_single = get_args(), len(model) == 1
    get_forward_backward_func()(
        forward_step_func=forward_step_func,
        data_iterator=iterators[0] if is_single else iterators,
        model=model,
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=None,
        forward_only=forward_only,
        adjust_tensor_shapes_fn=None,
    )


def _train_step(
    forward_step_func: Any, iterators: Any, model: list[Any], optimizer: Any, scheduler: Any
) -> None:
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    _schedule(forward_step_func, iterators, model, forward_only=False)
    optimizer.step()
    scheduler.step(increment=get_args().global_batch_size)


def _evaluate(forward_step_func: Any, model: list[Any], provider: Any, stages: list[int | None]) -> None:
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        iterators = [provider(vp_stage=stage) for stage in stages]
        _schedule(forward_step_func, iterators, model, forward_only=True)
    for chunk in model:
        chunk.train()


# From here on: pretrain_gpt.py.


def is_first_or_last_stage(vp_stage: int | None) -> bool:
    """Return whether this chunk embeds tokens or scores them."""
    last = (get_args().virtual_pipeline_model_parallel_size or 1) - 1
    first_chunk, last_chunk = (vp_stage or 0) == 0, vp_stage is None or vp_stage == last
    return (mpu.is_pipeline_first_stage() and first_chunk) or (mpu.is_pipeline_last_stage() and last_chunk)


def is_dataset_built_on_rank(vp_stage: int | None = None) -> bool:
    """Return whether this rank reads data for this chunk."""
    return is_first_or_last_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0


def get_batch(data_iterator: Iterator[Any] | None, vp_stage: int | None) -> list[Any]:
    """Return tokens, labels, loss mask, attention mask and positions of the next microbatch, None where unneeded."""
    if not is_first_or_last_stage(vp_stage):
        return [None] * 5
    args, names = get_args(), ["tokens", "labels", "loss_mask", "position_ids"]
    batch: dict[str, Any] = dict.fromkeys(names)
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {name: sample[name].cuda(non_blocking=True) for name in names}
    needed = names
    if args.pipeline_model_parallel_size > 1:
        needed = (
            ["tokens", "position_ids"] if mpu.is_pipeline_first_stage() else ["labels", "loss_mask"]
        )  # a stage with both ends of a pipeline of virtual stages included
    if args.virtual_pipeline_model_parallel_size is not None:
        needed = names
    for name in needed:
        if batch[name] is None:
            dtype = torch.float32 if name == "loss_mask" else torch.int64
            batch[name] = torch.empty(args.micro_batch_size, args.seq_length, dtype=dtype)
        dist.broadcast(
            batch[name], mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group()
        )
    return [batch["tokens"], batch["labels"], batch["loss_mask"], None, batch["position_ids"]]


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: Any = None) -> tuple[Any, ...]:
    """Return the loss sum, the number of counted tokens and what is logged."""
    losses = output_tensor.view(-1).float()
    loss = torch.sum(losses * loss_mask.view(-1).float())
    num_tokens = loss_mask.view(-1).sum().detach().clone().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().clone().view(1), num_tokens.view(1)])}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Run one microbatch through one chunk."""
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator, vp_stage)
    output_tensor = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output_tensor, partial(loss_func, loss_mask, model=model)


MODEL_TYPE = ModelType.encoder_or_decoder
