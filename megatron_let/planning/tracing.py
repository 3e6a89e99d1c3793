"""What a piece of training keeps and computes, counted while it runs on the meta device (or on a real one).

    with Tracer() as tracer:
        loss = model(tokens).sum()
        loss.backward()
    tracer.peak_bytes, tracer.flops

Every tensor that an operation returns is counted from its making to its end, so activations, their recomputation and
the temporaries of backward come out as the program makes them. Memory inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Products that torch's table of FLOPs lacks -> those of the same shapes.
_COUNTED_AS = {torch.ops.aten.addmm_: torch.ops.aten.addmm}


class Tracer(TorchDispatchMode):
    """Counts live bytes and the FLOPs of matrix products of all operations inside the context."""

    def __init__(self, device_type: str = "meta", *, num_shares: int = 1) -> None:
        """Start at nothing; only memory of this kind of device counts. Of keys there are `num_shares` times as many."""
        super().__init__()
        self._device_type, self._num_shares = device_type, num_shares
        self.live_bytes = 0
        self.peak_bytes = 0
        self.flops = 0.0
        self._known: dict[int, int] = {}
        """Storage -> bytes that it counts."""
        self._resizes = patch.object(torch.UntypedStorage, "resize_", self._resizing())

    def __enter__(self) -> Tracer:
        """Begin to count."""
        self._resizes.start()
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        """Stop counting."""
        self._resizes.stop()
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count its result and its FLOPs.

        A question for a truth is answered with yes: on meta tensors transformers alone asks some, whether all positions
        of a row follow each other and are seen.
        """
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            assert args[0].dtype is torch.bool, "a number was asked of a tensor without values"
            return True
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == self._device_type:
                self.see(value)
        packet = _COUNTED_AS.get(func.overloadpacket, func.overloadpacket)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result

    def see(self, tensor: torch.Tensor, *, is_counted: bool = True) -> None:
        """Count the memory of `tensor` from now to its end, once; with `is_counted` False never."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = 0
        if is_counted:
            self._grow(key, size)
        weakref.finalize(storage, self._forget, key)

    def _grow(self, key: int, size: int) -> None:
        self.live_bytes += size - self._known[key]
        self._known[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key)

    def _resizing(self) -> Callable[[torch.UntypedStorage, int], Any]:
        """Return what stands for a storage's `resize_`, by which megatron-core discards outputs that it will recompute."""
        resize = torch.UntypedStorage.resize_

        def count_and_resize(storage: torch.UntypedStorage, size: int) -> Any:
            if storage._cdata in self._known:
                self._grow(storage._cdata, size)
            return resize(storage, size)

        return count_and_resize

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Stand for `F.scaled_dot_product_attention` on meta tensors, where torch has only the kernel that keeps scores.

        Returns [b, n, s, d] in the memory order [b, s, n, d] as torch's flash attention does, and keeps what that keeps:
        query, key, value, the result and one fp32 number a row (arXiv 2205.14135, algorithm 1). FLOPs are those of a
        causal attention over the keys of all context-parallel shares, half the square; backward counts twice the forward.
        """
        num_keys = key.shape[-2] * self._num_shares
        forward_flops = 2.0 * query[..., 0].numel() * num_keys * (query.shape[-1] + value.shape[-1]) / 2
        context: torch.Tensor = _FusedAttention.apply(
            query, key, value, attn_mask, self._count, forward_flops
        )
        return context

    def _count(self, flops: float) -> None:
        self.flops += flops


@contextmanager
def traced(*, num_shares: int = 1) -> Iterator[Tracer]:
    """Trace what runs on the meta device inside the context, with fused attention; see Tracer."""
    with (
        Tracer(num_shares=num_shares) as tracer,
        patch.object(F, "scaled_dot_product_attention", tracer.attend),
        patch.object(torch, "autocast", _autocast),
    ):
        yield tracer


def _autocast(device_type: str, **settings: Any) -> Any:
    """Return torch's autocast, which knows no meta device."""
    return torch.amp.autocast("cpu" if device_type == "meta" else device_type, **settings)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        count: Callable[[float], None],
        flops: float,
    ) -> torch.Tensor:
        b, n, s, _ = query.shape
        context = query.new_empty(b, s, n, value.shape[-1]).transpose(1, 2)
        row_sums = query.new_empty(b, n, s, dtype=torch.float32)  # the logarithms of the softmax's sums
        ctx.save_for_backward(query, key, value, mask, context, row_sums)
        ctx.count, ctx.flops = count, flops
        count(flops)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.count(2 * ctx.flops)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None, None
