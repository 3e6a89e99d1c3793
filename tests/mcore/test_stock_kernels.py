"""The stock kernels against megatron-core's own fallbacks and against autograd.

fp32: both do the same sums in another order, a few roundings of 6e-8 apart. fp64 where a numerical gradient is taken.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_let.mcore import stock_kernels as ours
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.one_iteration import run_one_iteration
from megatron_let.testing.training import TINY_STUDENT, arguments

ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLACES = [
    (rope_utils, "_apply_rotary_pos_emb_bshd"),
    (clip_grads, "l2_norm_impl"),
    (clip_grads, "multi_tensor_scale_impl"),
    (layers, "_grad_accum_fusion_available"),
    (tensor_parallel, "vocab_parallel_cross_entropy"),
]


def test_they_stand_in_for_megatron_cores_inside_the_context_only() -> None:
    before = [getattr(owner, name) for owner, name in PLACES]
    assert not hasattr(layers, "fused_weight_gradient_mlp_cuda"), "apex is here: the test needs its absence"
    with ours.stock_kernels():
        inside = [getattr(owner, name) for owner, name in PLACES]
        assert inside[0] is ours.rotate_positions
        assert layers.fused_weight_gradient_mlp_cuda is ours.WeightGradients
        assert all(now is not then for now, then in zip(inside, before, strict=True))
    assert [getattr(owner, name) for owner, name in PLACES] == before
    assert not hasattr(layers, "fused_weight_gradient_mlp_cuda")


def test_kernels_that_megatron_core_has_found_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> None:
        """Stand for Transformer Engine's."""

    for name in ("l2_norm_impl", "multi_tensor_scale_impl"):
        monkeypatch.setattr(clip_grads, name, theirs)
    with ours.stock_kernels():
        assert clip_grads.l2_norm_impl is clip_grads.multi_tensor_scale_impl is theirs


@pytest.mark.parametrize("mscale", [1.0, 0.7])
@pytest.mark.parametrize("rotated", [8, 4, 2])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotation_is_megatron_cores_forward_and_backward(
    is_interleaved: bool, rotated: int, mscale: float
) -> None:
    angles = random(5, 1, 1, rotated // 2, seed=1)
    angles = torch.stack([angles, angles], -1).flatten(-2) if is_interleaved else torch.cat([angles] * 2, -1)
    results = []
    for rotate in (ours.rotate_positions, ours._CORE_ROTATION):
        states = random(5, 2, 3, 8).requires_grad_()
        turned = rotate(states, angles, rotary_interleaved=is_interleaved, mscale=mscale)
        turned.backward(random(5, 2, 3, 8, seed=2))
        results.append((turned, states.grad))
    assert_close(*results, **ROUNDING)


def test_rms_norm_is_its_definition_in_double_precision() -> None:
    states, weight, upstream = random(3, 2, 5), random(5, seed=1), random(3, 2, 5, seed=2)
    mine = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [states.double().requires_grad_(), weight.double().requires_grad_()]
    result = ours.rms_norm(mine[0], mine[1], 1e-3)
    expected = exact[0] * (exact[0].square().mean(-1, keepdim=True) + 1e-3).rsqrt() * exact[1]
    result.backward(upstream)
    expected.backward(upstream.double())
    assert_close(result.double(), expected, **ROUNDING)
    for tensor, reference in zip(mine, exact, strict=True):
        assert tensor.grad is not None
        assert_close(tensor.grad.double(), reference.grad, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_is_torchs(scale: float, dtype: torch.dtype) -> None:
    results = []
    for norm in (ours.rms_norm, lambda x, w, eps: torch.nn.functional.rms_norm(x, w.shape, w, eps)):
        states = (random(4, 3, 16) * scale).to(dtype).requires_grad_()
        weight = random(16, seed=1).to(dtype).requires_grad_()
        result = norm(states, weight, 1e-6)
        result.backward(random(4, 3, 16, seed=2).to(dtype))
        assert result.dtype is states.grad.dtype is weight.grad.dtype is dtype  # type: ignore[union-attr]
        results.append([tensor.float() for tensor in (result, states.grad, weight.grad)])  # type: ignore[union-attr]
    for mine, torchs in zip(*results, strict=True):
        # relative to the largest: entries that cancel keep the roundings of what cancelled (bf16: 2^-8 each)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        assert (mine - torchs).abs().max() <= tolerance * torchs.abs().max()


def test_a_row_of_zeros_has_no_nan() -> None:
    states = torch.zeros(2, 4, requires_grad=True)
    ours.rms_norm(states, torch.ones(4), 1e-6).sum().backward()
    assert states.grad is not None
    assert torch.isfinite(states.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gradient_is_added_to_what_is_there(dtype: torch.dtype) -> None:
    inputs, gradient = random(7, 3).to(dtype), random(7, 5, seed=1).to(dtype)
    start = random(5, 3, seed=2)
    main = start.clone()
    ours.WeightGradients.wgrad_gemm_accum_fp32(inputs, gradient, main)
    assert main.dtype is torch.float32
    expected = start + (gradient.t() @ inputs).float()
    assert_close(main, expected, **ROUNDING)


@pytest.mark.parametrize("is_padded", [False, True])
def test_the_loss_is_megatron_cores_forward_and_backward(
    is_padded: bool, one_process: ParallelContext
) -> None:
    labels = torch.randint(0, 8, (6, 2), generator=torch.Generator().manual_seed(3))
    results = []
    for loss in (ours.cross_entropy, ours._CORE_CROSS_ENTROPY):
        logits = (random(6, 2, 9) * 20).requires_grad_()
        used = logits.clone()  # megatron-core works in place
        if is_padded:
            used[..., 8:] = float("-inf")
        losses = loss(used, labels)
        losses.backward(random(6, 2, seed=4))
        assert losses.shape == labels.shape
        results.append((losses, logits.grad))
    assert_close(*results, **ROUNDING)
    assert results[0][1] is not None
    assert torch.isfinite(results[0][1]).all()


def test_a_loss_with_smoothing_or_a_shared_vocabulary_is_left_to_megatron_core(
    one_process: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = random(6, 2, 9), torch.zeros(6, 2, dtype=torch.long)
    expected = ours._CORE_CROSS_ENTROPY(logits.clone(), labels, 0.1)
    assert torch.equal(ours.cross_entropy(logits.clone(), labels, 0.1), expected)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(ours, "_CORE_CROSS_ENTROPY", lambda *_: "theirs")
    assert ours.cross_entropy(logits, labels) == "theirs"


def test_the_norm_of_many_tensors_is_megatron_cores(one_process: ParallelContext) -> None:
    tensors = [random(4, 3), random(7, seed=1), torch.zeros(2)]
    mine, _ = ours.multi_tensor_l2_norm(0, torch.zeros(1), [tensors], False)
    theirs, _ = local_multi_tensor_l2_norm(0, torch.zeros(1), [tensors], False)
    assert mine.shape == (1,)
    assert_close(mine, theirs.view(1), **ROUNDING)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_scaling_is_megatron_cores(scale: float | Tensor) -> None:
    mine, theirs = [random(4), random(3, 2, seed=1)], [random(4), random(3, 2, seed=1)]
    ours.multi_tensor_scale(0, torch.zeros(1), [mine, mine], scale)
    local_multi_tensor_scale(0, torch.zeros(1), [theirs, theirs], 0.25)
    for left, right in zip(mine, theirs, strict=True):
        assert torch.equal(left, right)


class _Calls(TorchDispatchMode):
    """Notes the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _operations(argv: list[str]) -> tuple[list[str], dict[str, Tensor]]:
    with _Calls() as calls:
        iteration = run_one_iteration(argv)
    return calls.names, iteration.gradients


@pytest.mark.parametrize(
    "changes", [{}, {"--untie-embeddings-and-output-weights": False}], ids=["untied", "tied"]
)
def test_a_run_adds_weight_gradients_in_place_and_to_the_same_sums(
    changes: dict[str, Any], pool: RankPool
) -> None:
    """Four weights in each of four layers and the LM head, each added to in each of eight microbatches."""
    words = arguments(TINY_STUDENT, {"--mock-data": None, "--train-iters": False, **changes})
    fused, gradients = pool.run(1, _operations, words)[0]
    apart, expected = pool.run(1, _operations, [*words, "--no-gradient-accumulation-fusion"])[0]
    assert fused.count("addmm_") == 17 * 8
    assert "addmm_" not in apart
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-7 + 1e-6 * float(expected[name].abs().max())
        )
