"""What every test shares: no network, no GPU, one pool of gloo ranks for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megatron_let.testing.distributed import RankPool

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module, and with it torch, is imported."""
    os.environ.update(OFFLINE)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Return the session's pool of up to four gloo ranks; workers start when first needed."""
    with RankPool(4) as ranks:
        yield ranks
