"""FP8 states of Transformer Engine's modules, made with stand-ins for its recipes: honest ones pass, others do not."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from megatron_let.errors import ConfigError
from megatron_let.mcore.extra_state import check_extra_states

PLACE = "transformer_engine.common.recipe"


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_compute_algo: Any = "max"
    fp8_gemm_fprop: MMParams = field(default_factory=MMParams)


@pytest.fixture(autouse=True)
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-ins be where Transformer Engine has its recipes."""
    modules = [ModuleType(name) for name in ("transformer_engine", "transformer_engine.common", PLACE)]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for kind in (_FormatHelper, Format, MMParams, DelayedScaling):
        setattr(modules[-1], kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", PLACE)


def honest() -> dict[str, Any]:
    """Return a state like Transformer Engine's, with delayed scaling."""
    return {
        "recipe": DelayedScaling(),
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(16, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "names": ["a", ("b", 1.5)]},
    }


def check(data: bytes, *, dtype: torch.dtype = torch.uint8) -> None:
    """Look at a chunk's state with one extra state of these bytes."""
    state = {
        "linear.weight": torch.ones(2),
        "linear._extra_state": torch.frombuffer(bytearray(data), dtype=dtype),
        "empty._extra_state": torch.empty(0, dtype=torch.uint8),
        "none._extra_state": None,
    }
    check_extra_states([{}, state], Path("iter_0000001"))


def test_an_honest_state_passes() -> None:
    data = pickle.dumps(honest())
    check(data)
    assert pickle.loads(data)["recipe"] == DelayedScaling()


class Calls:
    """An object whose pickle calls a function of no arguments."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def nested() -> object:
    """Return a tensor's numbers whose own file asks for a function."""
    return Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.getcwd)))


def recipe_with(**values: object) -> DelayedScaling:
    recipe = DelayedScaling()
    recipe.__dict__.update(values)
    return recipe


HOSTILE: dict[str, tuple[Callable[[], object], str]] = {
    "a function": (lambda: Calls(os.getcwd), "asks for posix.getcwd, which could run code"),
    "a function in a tensor": (nested, "cannot be read"),
    "a tensor of no bytes": (lambda: Calls(torch.storage._load_from_bytes, "text"), "a tensor in a way of its own"),
    "a method of the recipe": (
        lambda: recipe_with(__setstate__=torch.storage._load_from_bytes),
        "other than named values",
    ),
    "a function as a setting": (
        lambda: recipe_with(amax_compute_algo=torch.storage._load_from_bytes),
        "holds a function where a value belongs",
    ),
    "a function as a value": (
        lambda: {"recipe": torch.storage._load_from_bytes},
        "holds a function where a value belongs",
    ),
    "a recipe that is called": (lambda: Calls(DelayedScaling, 3), "an FP8 recipe in a way of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_state_is_refused(case: str) -> None:
    make, expected = HOSTILE[case]
    with pytest.raises(ConfigError) as caught:
        check(pickle.dumps({**honest(), "more": make()}))
    message = str(caught.value)
    assert message.startswith("iter_0000001 (linear._extra_state) ")
    assert expected in message


def test_a_state_of_a_format_member_is_refused() -> None:
    data = f"c{PLACE}\nFormat\n(I1\ntR}}b.".replace("I1\n", "K\x01").encode()
    with pytest.raises(ConfigError, match="changes a value after it was made"):
        check(data)


def test_other_numbers_than_bytes() -> None:
    with pytest.raises(ConfigError, match="holds other numbers than bytes"):
        check(b"1234", dtype=torch.int32)
