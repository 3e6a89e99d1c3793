"""What a student's numbers were in one iteration, so that NaN and infinity can be told and traced.

Recorded: each microbatch's output of every model chunk but the last (the loss speaks for that one), the gradient at each
chunk's input, and every parameter's gradient before data-parallel communication, where it is still this rank's own.
All of it stays on the device until it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_let.mcore.finite import Norms, count_bad, norms_of
from megatron_let.mcore.model import Student
from megatron_let.mcore.parallel import ParallelContext


@dataclass(frozen=True)
class ChunkWatch:
    """What passes through one model chunk, one norm a microbatch."""

    position: int
    """Of the chunk in the whole pipeline: 0 holds the embedding."""

    outputs: Norms
    """Norms of the chunk's output; none on the chunk that makes the loss."""

    input_gradients: Norms
    """Norms of the gradient that backward brings to the input of the chunk's first layer."""


class StudentWatch:
    """Hooks on this rank's chunks and gradient buckets; `begin_iteration` forgets what was recorded before.

    Takes the place of megatron-core's own check, which ends the program at the first NaN. Nothing it does changes a
    number or waits for the device.
    """

    def __init__(self, student: Student, context: ParallelContext) -> None:
        self._names = dict(_named_parameters(student))
        self._gradients: dict[int, Tensor] = {}  # bucket group -> norms of its parameters' gradients
        self._parameters: dict[int, list[Any]] = {}
        self._device = context.device
        self.chunks: list[ChunkWatch] = []
        for index, chunk in enumerate(student.gpt_chunks):
            watch = ChunkWatch(
                index * context.pp_size + context.pp_rank, Norms(context.device), Norms(context.device)
            )
            self.chunks.append(watch)
            _watch_chunk(chunk, watch)
        for wrapped in student.chunks:
            for group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups:
                self._watch_bucket_group(group)

    def begin_iteration(self) -> None:
        """Forget the iteration before."""
        self._gradients.clear()
        for chunk in self.chunks:
            chunk.outputs.clear()
            chunk.input_gradients.clear()

    def num_bad_gradients(self) -> Tensor:
        """Return how many parameters' own gradients are not finite, [] in fp64 on the device."""
        if not self._gradients:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return count_bad(torch.cat(list(self._gradients.values())))

    def bad_gradients(self) -> list[tuple[str, float]]:
        """Return (name, norm) of the parameters whose own gradient is not finite, in the order of the model."""
        norms = {
            parameter: norm
            for group, values in self._gradients.items()
            for parameter, norm in zip(self._parameters[group], values.tolist(), strict=True)
        }
        return _bad(
            (self._names[parameter], norms[parameter]) for parameter in self._names if parameter in norms
        )

    def bad_reduced_gradients(self) -> list[tuple[str, float]]:
        """Return (name, norm) of the parameters whose gradient is not finite as it is after communication."""
        parameters: list[Any] = list(self._names)
        norms = norms_of([parameter.main_grad for parameter in parameters]).tolist()
        return _bad(zip(self._names.values(), norms, strict=True))

    def bad_weights(self) -> list[tuple[str, float]]:
        """Return (name, norm) of the parameters that are not finite themselves."""
        norms = norms_of([parameter.detach() for parameter in self._names]).tolist()
        return _bad(zip(self._names.values(), norms, strict=True))

    def _watch_bucket_group(self, group: Any) -> None:
        key, plain_check = len(self._parameters), group.check_grads
        self._parameters[key] = [parameter for bucket in group.buckets for parameter in bucket.params_list]

        def record(check_for_nan_or_inf: bool, check_for_large: bool) -> None:
            if check_for_nan_or_inf:
                self._gradients[key] = norms_of([each.main_grad for each in self._parameters[key]])
            if check_for_large:
                plain_check(check_for_nan_or_inf=False, check_for_large=True)

        group.check_grads = record


def _bad(norms: Any) -> list[tuple[str, float]]:
    return [(name, norm) for name, norm in norms if not abs(norm) < float("inf")]


def _watch_chunk(chunk: GPTModel, watch: ChunkWatch) -> None:
    def on_output(_: torch.nn.Module, __: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            watch.outputs.add(output)

    def on_input(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # Under full recompute this runs twice, and only the pass inside backward carries gradient.
        if torch.is_grad_enabled() and hidden.requires_grad:
            hidden.register_hook(watch.input_gradients.add)

    if not chunk.post_process:
        chunk.register_forward_hook(on_output)
    if len(chunk.decoder.layers) > 0:
        chunk.decoder.layers[0].register_forward_pre_hook(on_input, with_kwargs=True)


def _named_parameters(student: Student) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """Yield each parameter with its name in the whole model: layers count from 0 over all stages."""
    prefix = "decoder.layers."
    for chunk in student.gpt_chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(prefix):
                index, rest = name.removeprefix(prefix).split(".", 1)
                name = f"{prefix}{chunk.decoder.layers[int(index)].layer_number - 1}.{rest}"
            yield parameter, name
