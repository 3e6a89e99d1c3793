"""What the tests of mcore share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_let.config.derive import resolve
from megatron_let.mcore.parallel import ParallelContext, parallel_context
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments


@pytest.fixture
def one_process() -> Iterator[ParallelContext]:
    """Enter the CPU backend and the process groups of a run on this process alone; return its context."""
    config = resolve(parse_arguments(arguments(TINY_STUDENT, {"--mock-data": None})), 1)
    with parallel_context(config) as context:
        yield context
