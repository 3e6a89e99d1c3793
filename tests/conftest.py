"""What every test shares: no network, no GPU, one pool of gloo ranks for the whole session."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from megatron_let.log import LOGGER
from megatron_let.testing.distributed import RankPool
from tests.surroundings import forget_failure, nothing_left_behind, set_surroundings


def pytest_configure(config: pytest.Config) -> None:
    """Set the surroundings before any test module, and with it torch, is imported."""
    set_surroundings()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Keep what a failed test held from being blamed on a later one."""
    outcome = yield
    if getattr(sys, "last_value", None) is not None:
        forget_failure()
    return outcome


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail the test that leaves something to the next, not the next."""
    with nothing_left_behind():
        yield


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Return the session's pool of up to four gloo ranks; workers start when first needed."""
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture
def context_of() -> Callable[..., Any]:
    """Return a maker of contexts for code that only looks at ranks and sizes: no process group stands behind."""
    import torch  # here, as below: torch must not be imported before the environment is set

    from megatron_let.mcore.parallel import ParallelContext

    def make(**changes: Any) -> ParallelContext:
        dimensions = {
            f"{kind}_{what}": what == "size" for kind in ("tp", "pp", "cp", "dp") for what in ("rank", "size")
        }
        values: dict[str, Any] = {name: int(value) for name, value in dimensions.items()}
        values.update(rank=0, world_size=1, vp_size=None, device=torch.device("cpu"), groups=cast(Any, None))
        return ParallelContext(**{**values, **changes})

    return make


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Return the log capture with the package's warnings in it, whatever a program configured before."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog
