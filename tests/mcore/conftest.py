"""What the tests of mcore share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from megatron_let.config.derive import resolve
from megatron_let.mcore.parallel import ParallelContext, parallel_context
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments


@pytest.fixture
def context_of() -> Callable[..., ParallelContext]:
    """Return a maker of contexts for code that only looks at ranks and sizes: no process group stands behind."""

    def make(**changes: Any) -> ParallelContext:
        dimensions = {
            f"{kind}_{what}": what == "size" for kind in ("tp", "pp", "cp", "dp") for what in ("rank", "size")
        }
        values: dict[str, Any] = {name: int(value) for name, value in dimensions.items()}
        values.update(rank=0, world_size=1, vp_size=None, device=torch.device("cpu"), groups=cast(Any, None))
        return ParallelContext(**{**values, **changes})

    return make


@pytest.fixture
def one_process() -> Iterator[ParallelContext]:
    """Enter the CPU backend and the process groups of a run on this process alone; return its context."""
    config = resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None})), 1)
    with parallel_context(config) as context:
        yield context
