"""Build the student: megatron-core GPT chunks of this rank, wrapped for mixed precision and data parallel."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.stock_layers import SdpaCoreAttention, StockNorm, stock_layer_spec
from megatron_let.mcore.transformer_config import build_transformer_config, uses_transformer_engine


@dataclasses.dataclass(frozen=True)
class Student:
    """The model chunks of this rank (one, or one a virtual stage), DDP-wrapped, and their core config."""

    chunks: list[DistributedDataParallel]
    core_config: TransformerConfig

    @property
    def gpt_chunks(self) -> list[GPTModel]:
        """Return the bare GPTModel chunks, in virtual-stage order."""
        return [unwrap(chunk) for chunk in self.chunks]

    def set_training(self, is_training: bool) -> None:
        """Switch every chunk between training and evaluation mode (dropout)."""
        for chunk in self.chunks:
            chunk.train(is_training)


def unwrap(module: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside Megatron's DDP and mixed-precision wrappers."""
    while isinstance(module, (DistributedDataParallel, Float16Module)):
        module = module.module
    assert isinstance(module, GPTModel), f"expected a GPTModel, found {type(module).__name__}"
    return module


def student_of(chunks: Sequence[torch.nn.Module]) -> Student:
    """Return the model chunks of another program as a student.

    Raises:
        ConfigError: one of them is no GPTModel in Megatron's own wrappers.
    """
    if not chunks:
        raise ConfigError("there is no model chunk on this rank")
    configs = [gpt_of(chunk).config for chunk in chunks]
    return Student(cast(list[DistributedDataParallel], list(chunks)), configs[0])


def gpt_of(chunk: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside a model chunk of another program.

    Raises:
        ConfigError: there is none, or it is in other wrappers than Megatron's own.
    """
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    if not isinstance(chunk, GPTModel):
        raise ConfigError(
            f"a model chunk is a {type(chunk).__name__}; LET knows megatron-core's GPTModel in its own "
            "DistributedDataParallel"
        )
    return chunk


@contextmanager
def gathered_parameters(config: RunConfig, student: Student) -> Iterator[None]:
    """Inside, every rank holds whole, current weights: needed to evaluate or save while gathers are overlapped.

    With `--overlap-param-gather` the new weights travel during the next training forward; here they are fetched at
    once and the overlap is put back on leaving.
    """
    is_overlapped = config.ddp.use_distributed_optimizer and config.ddp.overlap_param_gather
    if is_overlapped:
        for chunk in student.chunks:
            chunk.disable_forward_pre_hook()
    yield
    if is_overlapped:
        for chunk in student.chunks:
            chunk.enable_forward_pre_hook()


def build_student(
    config: RunConfig, context: ParallelContext, *, vocab_size: int, padded_vocab_size: int
) -> Student:
    """Build this rank's model chunks, move them to the device and wrap them.

    `vocab_size` ids are real; logits from there up to `padded_vocab_size` take part in the softmax only with
    `--no-mask-padded-logits`.
    """
    core_config = build_transformer_config(config, is_on_gpu=context.is_on_gpu)
    stages: list[int | None] = [None] if context.vp_size is None else list(range(context.vp_size))
    chunks: list[torch.nn.Module] = []
    for vp_stage in stages:
        model = build_gpt(
            config,
            core_config,
            padded_vocab_size=padded_vocab_size,
            groups=context.groups,
            pre_process=context.is_first_chunk(vp_stage),
            post_process=context.is_last_chunk(vp_stage),
            vp_stage=vp_stage,
            has_te_layers=uses_transformer_engine(config, is_on_gpu=context.is_on_gpu),
            has_document_masks=config.data.reset_attention_mask,
        )
        if config.model.mask_padded_logits:
            mask_padded_logits(model, vocab_size, tp_rank=context.tp_rank)
        for parameter in model.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        model.to(context.device)
        is_half = core_config.bf16 or core_config.fp16
        chunks.append(Float16Module(core_config, model) if is_half else model)
    return Student(_wrap_data_parallel(config, core_config, context, chunks), core_config)


def build_gpt(
    config: RunConfig,
    core_config: TransformerConfig,
    *,
    padded_vocab_size: int,
    groups: ProcessGroupCollection,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    has_te_layers: bool,
    has_document_masks: bool = False,
) -> GPTModel:
    """Build one bare GPTModel chunk on the given process groups."""
    model = config.model
    optional: dict[str, Any] = {}
    if model.rotary_seq_len_interpolation_factor is not None:
        optional["seq_len_interpolation_factor"] = model.rotary_seq_len_interpolation_factor
    # megatron-core turns --attention-backend into Transformer Engine's environment variables and asserts that every
    # later model wants the same: the stock layers, those of a teacher among them, have no business there.
    with nullcontext() if has_te_layers else patch.object(GPTModel, "_set_attention_backend"):
        return GPTModel(
            config=core_config,
            transformer_layer_spec=_layer_spec(
                core_config,
                vp_stage,
                groups,
                has_te_layers=has_te_layers,
                has_document_masks=has_document_masks,
            ),
            vocab_size=padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            rope_scaling=model.use_rope_scaling,
            rope_scaling_factor=model.rope_scaling_factor,
            pg_collection=groups,
            vp_stage=vp_stage,
            **optional,
        )


def _layer_spec(
    core_config: TransformerConfig,
    vp_stage: int | None,
    groups: ProcessGroupCollection,
    *,
    has_te_layers: bool,
    has_document_masks: bool,
) -> ModuleSpec | TransformerBlockSubmodules:
    if has_te_layers:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=core_config.qk_layernorm)
        if has_document_masks:  # Transformer Engine's attention is told "causal" and leaves the mask unread
            spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
        return spec
    num_layers = get_num_layers_to_build(core_config, vp_stage, groups.pp.rank())
    return TransformerBlockSubmodules(
        layer_specs=[stock_layer_spec(core_config)] * num_layers, layer_norm=StockNorm
    )


class _MaskedPadding(torch.autograd.Function):
    """Logits [..., v] with those from `first` on set to minus infinity, in place.

    Their gradient is 0 as it comes, their probability being 0. Autograd's own assignment would copy the gradient of all
    logits, the largest tensor of a step, to write that 0 once more.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, first: int) -> torch.Tensor:
        logits[..., first:] = float("-inf")
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def mask_padded_logits(model: GPTModel, vocab_size: int, *, tp_rank: int) -> None:
    """Set the logits of padding ids to minus infinity on the chunk that holds the LM head.

    The logits [s, b, v/tp] of tensor-parallel rank r hold ids r * v/tp upwards, so usually only the last rank has
    padding. A padding id then gets probability 0 and its row of weights gradient 0.
    """
    if not model.post_process:
        return
    shard = model.vocab_size // model.pg_collection.tp.size()
    first_padded = max(0, min(shard, vocab_size - tp_rank * shard))
    if first_padded == shard:
        return

    def mask(_: torch.nn.Module, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        masked: torch.Tensor = _MaskedPadding.apply(logits, first_padded)
        return masked, bias

    model.output_layer.register_forward_hook(mask)


def _wrap_data_parallel(
    config: RunConfig, core_config: TransformerConfig, context: ParallelContext, chunks: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    ddp_config = DistributedDataParallelConfig(**dataclasses.asdict(config.ddp))
    if ddp_config.bucket_size is None:
        # Larger data-parallel groups need larger buckets to stay bound by bandwidth.
        ddp_config.bucket_size = max(40_000_000, 1_000_000 * context.dp_size * context.cp_size)
    if not ddp_config.overlap_grad_reduce:
        ddp_config.bucket_size = None
    return [
        DistributedDataParallel(
            config=core_config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]
