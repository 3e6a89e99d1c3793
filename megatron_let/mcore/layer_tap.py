"""Catch the output of transformer layer k on the model chunk that owns it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

Target = TypeVar("Target")


def find_layer(chunks: Sequence[GPTModel], layer_number: int) -> tuple[int, torch.nn.Module] | None:
    """Return (chunk index, layer) of global layer `layer_number` (1-based) on this rank, or None elsewhere."""
    for index, chunk in enumerate(chunks):
        for layer in chunk.decoder.layers:
            if layer.layer_number == layer_number:
                return index, layer
    return None


class LayerTap(Generic[Target]):
    """A forward hook on one layer that joins each training pass to the microbatch it belongs to.

    Every pipeline schedule runs the microbatches of a chunk first in, first out, forward and backward alike.
    `push` queues what belongs to the microbatch whose forward is about to run; the pass that carries the gradient
    takes it off the queue. That is the forward itself, or, under full activation recompute, the second pass inside
    backward (the first runs without gradient, and by the time of the second other microbatches have been queued).
    With an empty queue (evaluation, weight zero) the hook does nothing.
    """

    def __init__(
        self, layer: torch.nn.Module, attach: Callable[[torch.Tensor, Target], torch.Tensor]
    ) -> None:
        self._attach = attach
        self._queue: deque[Target] = deque()
        self._hook = layer.register_forward_hook(self._on_forward)

    def push(self, target: Target) -> None:
        """Queue `target` for the microbatch whose forward comes next."""
        self._queue.append(target)

    def check_drained(self) -> None:
        """Assert that every queued microbatch met its gradient-carrying pass; call after each iteration."""
        assert not self._queue, f"{len(self._queue)} microbatches never met their alignment gradient"

    def remove(self) -> None:
        """Take the hook off the layer."""
        self._hook.remove()
        self._queue.clear()

    def _on_forward(self, _: torch.nn.Module, __: Any, output: Any) -> Any:
        if not self._queue or not torch.is_grad_enabled():
            return None
        hidden, *rest = output  # hidden: [s, b, h], or [s/tp, b, h] under sequence parallel
        return (self._attach(hidden, self._queue.popleft()), *rest)
