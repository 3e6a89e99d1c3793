"""Is every number of a tensor finite? Asked on the device, answered when somebody reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Norms:
    """2-norms in fp32 of the tensors of an iteration, in the order they came: one a microbatch.

    A norm that is not finite tells of NaN or infinity in its tensor (or of numbers above 1e19, which are none to train
    with). Adding launches one kernel and waits for nothing; only `read` waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._norms: list[Tensor] = []

    def add(self, tensor: Tensor) -> None:
        """Take the norm of `tensor`, of any shape, in fp16, bf16 or fp32."""
        self._norms.append(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32))

    def clear(self) -> None:
        """Forget all: a new iteration begins."""
        self._norms.clear()

    def num_bad(self) -> Tensor:
        """Return how many are not finite, [] in fp64 on the device."""
        if not self._norms:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return count_bad(torch.stack(self._norms))

    def read(self) -> list[float]:
        """Return the norms; waits for the device."""
        return [float(norm) for norm in self._norms]


def count_bad(values: Tensor) -> Tensor:
    """Return how many of `values` are not finite, [] in fp64 on their device."""
    return (~values.isfinite()).sum(dtype=torch.float64)


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each of `tensors` in fp32, [number of tensors]; on a GPU a handful of kernels."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))
