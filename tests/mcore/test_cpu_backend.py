"""The CPU backend answers CUDA calls inside its context and leaves nothing behind."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron.core.tensor_parallel.random as mcore_random
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import _device_constructors

from megatron_let.mcore.cpu_backend import FACTORIES, cpu_backend
from tests.processes import HANG_SECONDS

REPLACED = [
    (torch.cuda, "current_device"),
    (torch.cuda, "get_rng_state"),
    (torch.cuda.random, "get_rng_state"),
    (torch.cuda, "set_rng_state"),
    (torch.cuda.random, "set_rng_state"),
    (torch.cuda, "manual_seed"),
    (torch.cuda, "synchronize"),
    (mcore_random, "_set_cuda_rng_state"),
]


def everything_that_may_change() -> list[Any]:
    """Return every attribute of the modules concerned, and torch's stack of function modes."""
    modules = (torch, torch.cuda, torch.cuda.random, torch.Tensor, mcore_random)
    attributes = [(module, name, id(value)) for module in modules for name, value in vars(module).items()]
    return [*attributes, *_get_current_function_mode_stack()]


def test_everything_is_put_back_on_leaving() -> None:
    before = everything_that_may_change()
    originals = [getattr(owner, name) for owner, name in REPLACED]
    with cpu_backend():
        inside = [getattr(owner, name) for owner, name in REPLACED]
        assert all(now is not then for now, then in zip(inside, originals, strict=True))
    assert everything_that_may_change() == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_everything_is_put_back_after_an_error() -> None:
    before = everything_that_may_change()
    with pytest.raises(ZeroDivisionError), cpu_backend():
        raise ZeroDivisionError
    assert everything_that_may_change() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.empty(2, device=torch.device("cuda", 0)),
        lambda: torch.tensor([1.0], device=torch.cuda.current_device()),
        lambda: torch.arange(3, device="cuda:0"),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2).to(device="cuda"),
        lambda: torch.nn.Linear(2, 2, device="cuda").weight,
    ],
)
def test_what_is_made_on_cuda_is_made_on_the_cpu(make: Callable[[], torch.Tensor]) -> None:
    with cpu_backend():
        assert make().device == torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
        (torch.int64, "torch.LongTensor"),
    ],
)
def test_tensors_call_themselves_what_the_optimizer_looks_for(dtype: torch.dtype, name: str) -> None:
    with cpu_backend():
        assert torch.zeros(1, dtype=dtype).type() == name
        assert torch.zeros(1, dtype=dtype).type(torch.float64).dtype is torch.float64


def test_a_device_context_works_inside_and_afterwards() -> None:
    _device_constructors.cache_clear()
    with cpu_backend(), torch.device("meta"):
        assert torch.empty(2).device == torch.device("meta")
    with torch.device("meta"):
        assert torch.zeros(2).device == torch.device("meta")


def test_ordinary_calls_take_no_detour() -> None:
    with cpu_backend():
        assert _get_current_function_mode_stack() == []
        assert torch.Tensor.matmul is torch._C.TensorBase.matmul


def test_the_cuda_generator_is_the_cpu_generator() -> None:
    state = torch.get_rng_state()
    try:
        with cpu_backend():
            torch.cuda.manual_seed(5)
            kept = torch.cuda.get_rng_state()
            first = torch.rand(3)
            torch.cuda.set_rng_state(kept)
            assert torch.equal(torch.rand(3), first)
            mcore_random._set_cuda_rng_state(kept)
            assert torch.equal(torch.rand(3), first)
            torch.cuda.synchronize()
    finally:
        torch.set_rng_state(state)


def test_on_a_machine_with_a_gpu_it_is_refused() -> None:
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        pytest.raises(RuntimeError, match="machine with a GPU"),
        cpu_backend(),
    ):
        pass


def test_every_torch_call_of_megatron_core_that_names_a_device_is_answered() -> None:
    import megatron.core

    called = set()
    for path in Path(megatron.core.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or all(k.arg != "device" for k in node.keywords):
                continue
            function = ast.unparse(node.func)
            if function.startswith("torch.") and function.count(".") == 1:
                called.add(function.removeprefix("torch."))
    assert "empty_like" in called  # the scan finds what it looks for
    assert called - {"Generator"} <= set(FACTORIES)  # generators: inference only


def test_training_starts_without_torchs_compiler() -> None:
    program = (
        "import sys, warnings, torch; compiler = torch.compile; warnings.simplefilter('ignore')\n"
        "import megatron_let.training.build\n"
        "assert torch.compile is compiler\n"
        "print([name for name in ('torch._inductor', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.stdout == "[]\n", done.stderr
