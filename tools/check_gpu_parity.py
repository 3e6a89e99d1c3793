"""Parity of `tools/check_gpu.py`: loss and gradient of one LET iteration on the CPU, on the GPU, with Transformer Engine.

Every side is a process of its own and starts from the same checkpoint, whose weights bf16 can hold exactly, on the same
tokens, beside the same teacher. The reference is the stock path in fp32 on the CPU, which the test suite holds against
Hugging Face's models. Errors of a gradient are 2-norms of the difference over 2-norms of the reference.

* fp32, TF32 off: the same sums in another order. A thousand roundings of 6e-8 are 6e-5, and what is wrong (a mask, a
  scale, a layout) is 1e-2 and more: bounds of 1e-5 for losses and 1e-4 for gradients.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_inputs import write_hf_teacher, write_random_tokens
from benchmark_reference import GptShape
from check_gpu_rows import Rows, Setting, last_words

from megatron_let.optional import has_transformer_engine
from megatron_let.testing.training import TINY_STUDENT, arguments

FP32_LOSS, FP32_GRADIENT = 1e-5, 1e-4
BF16_LOSS, BF16_OVER_CPU = 2e-3, 2.0
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
    sides = {"CPU stock": "auto", "GPU stock": "local", "GPU Transformer Engine": "transformer_engine"}
    if not (setting.is_on_gpu and has_transformer_engine()):
        del sides["GPU Transformer Engine"]
    for name, layers in sides.items():
        rows.guarded(name, lambda name=name, layers=layers: _run_side(setting, name, layers))  # type: ignore[misc]
    if not _results(setting, "CPU stock"):
        return
    for name in list(sides)[1:]:
        if _results(setting, name):
            rows.guarded(name, lambda name=name: _compare(setting, name, rows))  # type: ignore[misc]
    if "GPU Transformer Engine" not in sides:
        why = "Transformer Engine is not installed" if setting.is_on_gpu else "there is no GPU"
        rows.not_run("GPU Transformer Engine against CPU stock", why)


def _run_side(setting: Setting, name: str, layers: str) -> None:
    """Run one side in a process of its own; raises RuntimeError when it fails."""
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    if name.startswith("CPU"):
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = Path(setting.directory, f"side {name}.log")
    words = [sys.executable, __file__, name, layers, json.dumps(asdict(setting))]
    with log.open("w") as output:
        status = subprocess.run(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=SIDE_SECONDS, check=False
        ).returncode
    if status != 0:
        raise RuntimeError(f"exit code {status}: {last_words(log)}")


def run_side(name: str, layers: str, setting: Setting) -> None:
    """Be one side: an iteration in fp32 and one in bf16, from the checkpoint that the CPU's side writes first."""
    import torch

    from megatron_let.testing.one_iteration import run_one_iteration, write_spread_checkpoint

    start = Path(setting.directory, "start")
    if name == "CPU stock":
        plain = student_flags(setting, **dict.fromkeys(_let_flags(setting), False))
        write_spread_checkpoint(plain, start, spread=SPREAD, rounded_to=torch.bfloat16)
    flags: dict[str, Any] = {"--load": start, "--finetune": None, "--transformer-impl": layers}
    for precision in ("fp32", "bf16"):
        half = {} if precision == "fp32" else {"--bf16": None}
        iteration = run_one_iteration(student_flags(setting, **flags, **half))
        assert iteration.row is not None, "rank 0 logs"
        gradients = {_stock_name(key): value.cpu() for key, value in iteration.gradients.items()}
        result = {"lm": iteration.row.lm_loss, "let": iteration.row.let_loss, "gradients": gradients}
        torch.save(result, _result_file(setting, name, precision))


def _let_flags(setting: Setting) -> list[str]:
    return [word for word in student_flags(setting) if word.startswith("--let-")]


def _stock_name(name: str) -> str:
    for ending, stock in _TE_NAMES.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + stock
    return name


def _result_file(setting: Setting, name: str, precision: str) -> Path:
    return Path(setting.directory, f"side {name} {precision}.pt")


def _results(setting: Setting, name: str) -> dict[str, dict[str, Any]]:
    """Return what a side has left, by precision; empty when it failed."""
    import torch

    paths = {precision: _result_file(setting, name, precision) for precision in ("fp32", "bf16")}
    if not all(path.exists() for path in paths.values()):
        return {}
    return {precision: torch.load(path, weights_only=True) for precision, path in paths.items()}


def _compare(setting: Setting, name: str, rows: Rows) -> None:
    """Add the rows of one side against the CPU."""
    cpu, side = _results(setting, "CPU stock"), _results(setting, name)
    reference = cpu["fp32"]
    for precision, bound in (("fp32", FP32_LOSS), ("bf16", BF16_LOSS)):
        errors = {key: loss_error(side[precision][key], reference[key]) for key in ("lm", "let")}
        rows.held(
            f"{name}, {precision}: losses against CPU fp32",
            ", ".join(f"{key} {error:.1e}" for key, error in errors.items()),
            f"{bound:.0e}",
            holds=all(error <= bound for error in errors.values()),
            **errors,
        )
    worst, where, overall = gradient_errors(side["fp32"]["gradients"], reference["gradients"])
    rows.held(
        f"{name}, fp32: gradients against CPU fp32",
        f"all {overall:.1e}, worst {worst:.1e} ({where})",
        f"{FP32_GRADIENT:.0e}",
        holds=worst <= FP32_GRADIENT,
        overall=overall,
        worst=worst,
    )
    expected, _, expected_overall = gradient_errors(cpu["bf16"]["gradients"], reference["gradients"])
    worst, where, overall = gradient_errors(side["bf16"]["gradients"], reference["gradients"])
    rows.held(
        f"{name}, bf16: gradients against CPU fp32",
        f"all {overall:.1e}, worst {worst:.1e} ({where})",
        f"{BF16_OVER_CPU:g} x CPU bf16's: {BF16_OVER_CPU * expected_overall:.1e}, {BF16_OVER_CPU * expected:.1e}",
        holds=worst <= BF16_OVER_CPU * expected and overall <= BF16_OVER_CPU * expected_overall,
        overall=overall,
        worst=worst,
        cpu_overall=expected_overall,
        cpu_worst=expected,
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
    run_side(sys.argv[1], sys.argv[2], replace(Setting(**json.loads(sys.argv[3]))))
