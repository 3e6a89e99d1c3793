"""Parity of `tools/check_gpu.py`: loss and gradient of one LET iteration on the CPU, on the GPU, with Transformer Engine.

Every side is a process of its own and starts from the same checkpoint, whose weights bf16 can hold exactly, on the same
tokens, beside the same teacher. The reference is the stock path in fp32 on the CPU, which the test suite holds against
Hugging Face's models. Errors of a gradient are 2-norms of the difference over 2-norms of the reference.

* fp32, TF32 off: the same sums in another order. A thousand roundings of 6e-8 are 6e-5, and what is wrong (a mask, a
  scale, a layout) is 1e-2 and more: bounds of 1e-5 for losses and 1e-4 for gradients.
* FP8 (e4m3 forward, e5m2 gradients, scaled by the largest value of each tensor, so that a first iteration has a scale): a
  product's terms are off by 2^-4 to 2^-3, and so is its sum when they cancel; some ten products lie between the loss and
  the first layer. 0.35 of all gradients together lies above that, and below the 0.7 and more of a product that is lost.
* bf16: the two sides round at the same places to 2^-9, but other values. So the error against fp32 is held against
  that of the CPU in bf16: at most twice as large, for a kernel may round once more or once less in a layer. Losses are
  means over thousands of tokens: 2e-3, a rounding of 2^-9.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_inputs import write_hf_teacher, write_random_tokens
from benchmark_reference import GptShape
from check_gpu_rows import Rows, Setting, fusion_flags, last_words

from megatron_let.optional import has_transformer_engine
from megatron_let.testing.training import TINY_STUDENT, arguments

FP32_LOSS, FP32_GRADIENT = 1e-5, 1e-4
BF16_LOSS, BF16_OVER_CPU = 2e-3, 2.0
FP8_LOSS, FP8_GRADIENT = 2e-2, 0.35
FP8_CAPABILITY = (8, 9)
SIDE_SECONDS = 100
SPREAD = 0.02

FULL: Mapping[str, Any] = {
    "--num-layers": 4,
    "--hidden-size": 512,
    "--num-attention-heads": 8,
    "--num-query-groups": 4,
    "--ffn-hidden-size": 1376,
    "--seq-length": 512,
    "--vocab-size": 2047,
    "--make-vocab-size-divisible-by": 128,
    "--micro-batch-size": 2,
    "--global-batch-size": 4,
}
# Names of weights as Transformer Engine's layers have them, which hold the norm before a matrix.
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "bf16": {"--bf16": None},
    "fp8": {"--bf16": None, "--fp8-format": "hybrid", "--fp8-recipe": "tensorwise"},
}


@dataclass(frozen=True)
class Side:
    """One program of the comparison."""

    name: str
    layers: str
    precisions: tuple[str, ...]


REFERENCE = Side("CPU stock", "auto", ("fp32", "bf16"))


def student_flags(setting: Setting, **changes: Any) -> list[str]:
    """Return the command line of a small LET run; its files are written by `write_inputs`."""
    directory = Path(setting.directory)
    flags: dict[str, Any] = {
        "--train-iters": False,
        "--data-path": directory / "tokens",
        "--split": "100,0,0",
        "--let-teacher-load": directory / "teacher",
        "--let-student-layer": 2,
        "--let-weight": 1.0,
        "--let-stop-iters": 1,
        **(FULL if setting.size == "full" else {}),
        **dict.fromkeys(fusion_flags(setting)),
    }
    return arguments(TINY_STUDENT, {**flags, **changes})


def write_inputs(setting: Setting) -> None:
    """Write tokens and teacher, unless another part has."""
    directory = Path(setting.directory)
    if (directory / "teacher").exists():
        return
    is_full = setting.size == "full"
    vocab_size, seq_length = (2048, 512) if is_full else (61, 32)
    write_random_tokens(directory / "tokens", num_tokens=60 * seq_length, vocab_size=vocab_size)
    sizes = (6, 256, 688, 8, 4) if is_full else (2, 24, 40, 4, 2)
    write_hf_teacher(directory / "teacher", GptShape(*sizes, seq_length=seq_length, vocab_size=vocab_size))


def parity(setting: Setting, rows: Rows) -> None:
    """Run the sides and compare each with the CPU."""
    write_inputs(setting)
    has_te, no_fp8 = setting.is_on_gpu and has_transformer_engine(), why_no_fp8(setting)
    sides = [REFERENCE, Side("GPU stock", "local", ("fp32", "bf16"))]
    if has_te:
        precisions = ("fp32", "bf16") if no_fp8 is not None else ("fp32", "bf16", "fp8")
        sides.append(Side("GPU Transformer Engine", "transformer_engine", precisions))
    for side in sides:
        rows.guarded(side.name, partial(_run_side, setting, side))
    for side in sides[1:]:
        if all(_result_file(setting, one, "bf16").exists() for one in (REFERENCE, side)):
            rows.guarded(side.name, partial(_compare, setting, side, rows))
    if not has_te:
        why = "Transformer Engine is not installed" if setting.is_on_gpu else "there is no GPU"
        rows.not_run("GPU Transformer Engine against CPU stock", why)
    elif no_fp8 is not None:
        rows.not_run("FP8 against CPU fp32", no_fp8)


def why_no_fp8(setting: Setting) -> str | None:
    """Return why nothing can be computed in FP8 here, None where it can."""
    import torch

    if not (setting.is_on_gpu and has_transformer_engine()):
        return "Transformer Engine is not installed" if setting.is_on_gpu else "there is no GPU"
    if torch.cuda.get_device_capability() < FP8_CAPABILITY:
        return f"{torch.cuda.get_device_name()} has no FP8"
    return None


def _run_side(setting: Setting, side: Side) -> None:
    """Run one side in a process of its own; raises RuntimeError when it fails."""
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    if side is REFERENCE:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = Path(setting.directory, f"side {side.name}.log")
    words = [sys.executable, __file__, json.dumps(asdict(side)), json.dumps(asdict(setting))]
    with log.open("w") as output:
        status = subprocess.run(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=SIDE_SECONDS, check=False
        ).returncode
    if status != 0:
        raise RuntimeError(f"exit code {status}: {last_words(log)}")


def run_side(setting: Setting, side: Side) -> None:
    """Be one side: an iteration in each precision, from the checkpoint that the CPU's side writes first."""
    import torch

    from megatron_let.testing.one_iteration import run_one_iteration, write_spread_checkpoint

    start = Path(setting.directory, "start")
    if side.name == REFERENCE.name:
        plain = student_flags(setting, **dict.fromkeys(_let_flags(setting), False))
        write_spread_checkpoint(plain, start, spread=SPREAD, rounded_to=torch.bfloat16)
    flags: dict[str, Any] = {"--load": start, "--finetune": None, "--transformer-impl": side.layers}
    for precision in side.precisions:
        iteration = run_one_iteration(student_flags(setting, **flags, **PRECISIONS[precision]))
        assert iteration.row is not None, "rank 0 logs"
        gradients = {_stock_name(key): value.cpu() for key, value in iteration.gradients.items()}
        result = {"lm": iteration.row.lm_loss, "let": iteration.row.let_loss, "gradients": gradients}
        torch.save(result, _result_file(setting, side, precision))


def _let_flags(setting: Setting) -> list[str]:
    return [word for word in student_flags(setting) if word.startswith("--let-")]


def _stock_name(name: str) -> str:
    for ending, stock in _TE_NAMES.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + stock
    return name


def _result_file(setting: Setting, side: Side, precision: str) -> Path:
    return Path(setting.directory, f"side {side.name} {precision}.pt")


def _compare(setting: Setting, side: Side, rows: Rows) -> None:
    """Add the rows of one side against the CPU."""
    import torch

    def load(of: Side, precision: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(_result_file(setting, of, precision), weights_only=True)
        return found

    name, reference = side.name, load(REFERENCE, "fp32")
    cpu_worst, _, cpu_overall = gradient_errors(load(REFERENCE, "bf16")["gradients"], reference["gradients"])
    bounds = {
        "fp32": (FP32_LOSS, FP32_GRADIENT, FP32_GRADIENT, f"{FP32_GRADIENT:.0e}"),
        "bf16": (
            BF16_LOSS,
            BF16_OVER_CPU * cpu_overall,
            BF16_OVER_CPU * cpu_worst,
            f"{BF16_OVER_CPU:g} x CPU bf16's: {BF16_OVER_CPU * cpu_overall:.1e}, {BF16_OVER_CPU * cpu_worst:.1e}",
        ),
        "fp8": (FP8_LOSS, FP8_GRADIENT, math.inf, f"{FP8_GRADIENT:g} all together"),
    }
    for precision in side.precisions:
        result = load(side, precision)
        loss_bound, overall_bound, worst_bound, shown = bounds[precision]
        errors = {key: loss_error(result[key], reference[key]) for key in ("lm", "let")}
        rows.held(
            f"{name}, {precision}: losses against CPU fp32",
            ", ".join(f"{key} {error:.1e}" for key, error in errors.items()),
            f"{loss_bound:.0e}",
            holds=all(error <= loss_bound for error in errors.values()),
            **errors,
        )
        worst, where, overall = gradient_errors(result["gradients"], reference["gradients"])
        rows.held(
            f"{name}, {precision}: gradients against CPU fp32",
            f"all {overall:.1e}, worst {worst:.1e} ({where})",
            shown,
            holds=overall <= overall_bound and worst <= worst_bound,
            overall=overall,
            worst=worst,
            cpu_overall=cpu_overall,
            cpu_worst=cpu_worst,
        )


def loss_error(actual: float, expected: float) -> float:
    """Return the difference over the expected value, or over 1 where that is smaller: a cosine may be near 0."""
    difference = abs(actual - expected) / max(1.0, abs(expected))
    return difference if difference == difference else float("inf")


def gradient_errors(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, str, float]:
    """Return the largest relative error of a tensor, that tensor's name, and the error of all taken together.

    Raises:
        ValueError: not the same tensors.
    """
    if actual.keys() != expected.keys():
        raise ValueError(f"gradients of other weights: {sorted(actual.keys() ^ expected.keys())[:4]}")
    squares = {
        name: (float((actual[name] - value).double().square().sum()), float(value.double().square().sum()))
        for name, value in expected.items()
    }
    relative = {
        name: (difference / size) ** 0.5 if size else math.inf if difference else 0.0
        for name, (difference, size) in squares.items()
    }
    relative = {name: error if error == error else float("inf") for name, error in relative.items()}
    worst = max(relative, key=lambda name: relative[name])
    total = [sum(pair[index] for pair in squares.values()) for index in (0, 1)]
    return relative[worst], worst, (total[0] / total[1]) ** 0.5


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    run_side(
        Setting(**json.loads(sys.argv[2])), Side(words["name"], words["layers"], tuple(words["precisions"]))
    )
