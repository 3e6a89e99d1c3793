"""--manual-gc: when Python's garbage is collected."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

import pytest

from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train

BASE: dict[str, Any] = {"--mock-data": None, "--manual-gc": None, "--eval-iters": 1, "--eval-interval": 2}
ALL: dict[str, int] = {}
NEW = {"generation": 0}
# validations after iterations 2 and 4 and two at the end (validation and test data)
AROUND_VALIDATION = [ALL, NEW] * 4


def collections(argv: list[str]) -> list[Any]:
    """Train and return with what arguments garbage was collected, in order."""
    with patch.object(gc, "collect") as collect:
        train(argv)
    gc.enable()
    return [call.kwargs for call in collect.call_args_list]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, AROUND_VALIDATION),
        ({"--no-manual-gc-eval": None}, []),
        ({"--no-manual-gc-eval": None, "--manual-gc-interval": 2}, [ALL, ALL]),
    ],
)
def test_garbage_is_collected_before_and_after_validation_and_when_due(
    changes: dict[str, Any], expected: list[Any], pool: RankPool
) -> None:
    assert pool.run(1, collections, arguments(TINY_STUDENT, {**BASE, **changes})) == [expected]
