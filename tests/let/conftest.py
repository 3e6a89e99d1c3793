"""What the tests of `megatron_let.let` share: the same random numbers in every order of running them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(1234)
