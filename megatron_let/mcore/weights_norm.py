"""The 2-norm of all weights of the student, for the log."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_let.mcore.finite import norms_of
from megatron_let.mcore.model import Student
from megatron_let.mcore.parallel import ParallelContext


def weights_norm(student: Student, context: ParallelContext) -> float:
    """Return the norm over every weight once, in fp32; every rank must call this, with gathered parameters.

    Where the model's weights have 16 bits it is that of the optimizer's, as in Megatron-LM; the distributed optimizer
    has them in shards, one a data-parallel rank. Copies (of other data-parallel ranks, of tensor-parallel ranks that
    do not split a weight, of a tied embedding) are left out. One all-reduce of a number.
    """
    counts_whole = context.dp_rank == context.cp_rank == 0
    counted: list[torch.Tensor] = []
    for parameter in (parameter for chunk in student.chunks for parameter in chunk.parameters()):
        if not param_is_not_shared(parameter) or not param_is_not_tensor_parallel_duplicate(parameter):
            continue
        # megatron-core's optimizers leave both on the model's 16-bit parameters, and on no other.
        main = getattr(parameter, "main_param", None)
        if getattr(parameter, "main_param_sharded", False):
            counted += [] if main is None else [main.detach()]
        elif counts_whole:
            counted.append(parameter.detach() if main is None else main.detach())
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    if counted:
        total = norms_of(counted).double().square().sum()
    dist.all_reduce(total)
    return math.sqrt(float(total))
