"""Plans of the tiny student."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_let.errors import ProblemsError
from megatron_let.planning.plan import PlanSettings, RunPlan
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.plan import make_plan

MOCK = {"--mock-data": None}


def plan_of(changes: dict[str, Any], world_size: int = 1, **settings: Any) -> RunPlan:
    """Return the plan of the tiny student with these changes of its flags."""
    return make_plan(parse_arguments(arguments(TINY_STUDENT, changes)), PlanSettings(world_size, **settings))


def problems_of(changes: dict[str, Any], world_size: int = 1, **settings: Any) -> list[str]:
    """Return all that keeps such a run from starting."""
    with pytest.raises(ProblemsError) as caught:
        plan_of(changes, world_size, **settings)
    return str(caught.value).split("\nerror: ")
