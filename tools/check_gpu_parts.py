"""The parts of `tools/check_gpu.py`, one a process: `python tools/check_gpu_parts.py PART SETTING.json`.

Device and shapes come from the setting; nothing else tells a GPU from a CPU, so that the tests run the same code.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_ours import our_run
from benchmark_shapes import SHAPES, BenchmarkShape, flop_floor
from check_gpu_parity import parity, why_no_fp8
from check_gpu_resume import resume
from check_gpu_rows import Rows, Setting, fusion_flags

from megatron_let.optional import has_apex, has_fused_weight_gradient, has_transformer_engine
from megatron_let.planning.flops import peak_flops
from megatron_let.regular_files import read_text

PLAN_RUN = Path(__file__).with_name("plan_run.py")
WARM_UP, TIMED = 5, 10
DEPTH = 8
"""Layers of the 24 of the 1.4B recipe."""

# The paper's authors pay 8 % for a teacher whose floor is 3.2 %.
FLOOR_TIMES = 2.5
PLAN_ERROR = 0.1
"""Share of the measured peak by which a plan's memory may be off."""

TEACHER_SHARE = 0.99
"""Of the teacher's bytes that must come back: allocations are rounded up, so that more than all does."""


def shape_of(setting: Setting) -> BenchmarkShape:
    """Return the 1.4B recipe at full width and reduced depth, or the tiny one."""
    shape = SHAPES["tiny" if setting.size == "tiny" else "1.4B"]
    return (
        shape if setting.size == "tiny" else replace(shape, student=replace(shape.student, num_layers=DEPTH))
    )


def bench_of(setting: Setting, name: str, *, repeats: int, steps: int) -> Any:
    """Return the benchmark's settings for runs of this part, its tokens written."""
    from benchmark_measure import WARM_UP_STEPS, Bench

    directory = Path(setting.directory, name)
    directory.mkdir()
    bench = Bench(
        shape=shape_of(setting),
        repeats=repeats,
        steps=steps,
        num_threads=1,
        num_steps=WARM_UP_STEPS + repeats * steps,
        is_bf16=True,
        directory=directory,
        more_flags=fusion_flags(setting),
    )
    bench.write_tokens()
    return bench


def environment(setting: Setting, rows: Rows) -> None:
    """Say what this machine has."""
    import torch

    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("megatron-core", "transformer-engine", "transformers", "triton"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    rows.measured("versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    if setting.is_on_gpu:
        gpu = torch.cuda.get_device_properties(0)
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
        rows.measured(
            "device",
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}, CUDA "
            f"{torch.version.cuda}, NCCL {nccl}",
        )
    else:
        rows.measured("device", f"CPU with {torch.backends.cpu.get_cpu_capability()}")
    is_te = setting.is_on_gpu and has_transformer_engine()
    rows.measured("layers that runs take by themselves", "Transformer Engine" if is_te else "stock")
    optional = {"apex": has_apex(), "fused weight gradient": has_fused_weight_gradient()}
    rows.measured(
        "other kernels",
        ", ".join(f"{name}: {'yes' if is_there else 'no'}" for name, is_there in optional.items()),
    )
    if fusion_flags(setting):
        rows.not_run("compiled elementwise kernels", "no C compiler is installed, which Triton needs")


def steps_bf16(setting: Setting, rows: Rows) -> None:
    """Measure training steps in BF16."""
    _steps(setting, rows, "bf16", [])


def steps_fp8(setting: Setting, rows: Rows) -> None:
    """Measure training steps in FP8, where there is Transformer Engine and a GPU for it."""
    reason = why_no_fp8(setting)
    if reason is not None:
        rows.not_run("FP8 steps", reason)
        return
    _steps(setting, rows, "fp8", ["--fp8-format", "hybrid"])


def _steps(setting: Setting, rows: Rows, name: str, flags: list[str]) -> None:
    """Time steps of the plain recipe and say what they are worth."""
    bench = bench_of(setting, name, repeats=2, steps=TIMED)
    flags = [*bench.flags("run"), *flags]
    with our_run(flags) as run:
        run.steps(WARM_UP)
        peak = run.peak_memory(1)
        seconds = statistics.median(step.wall for step in run.steps(TIMED))
        losses, per_token = run.losses(), run.flops_per_token()
        what = f"{name} step, {run.layers()} layers"
    tokens = bench.shape.tokens_per_step / seconds
    student = bench.shape.student
    rows.measured(
        f"{what}: speed",
        f"{tokens:,.0f} tokens/s, {1e3 * seconds:.1f} ms a step of {bench.shape.tokens_per_step:,} tokens, "
        f"{student.num_layers} x {student.hidden_size}",
        tokens_per_second=tokens,
        step_ms=1e3 * seconds,
    )
    rows.measured(f"{what}: work", *_work(setting, tokens * per_token), tflops=tokens * per_token / 1e12)
    rows.measured(f"{what}: peak memory", f"{peak / 2**30:.2f} GiB", bytes=peak)
    if name == "bf16":
        _hold_plan(setting, rows, what, planned_memory(flags, bench.directory)["after_stop"], peak)
    # Random tokens: a model that has learned nothing yet, and cannot, gives ln(vocabulary), and a little more at first.
    limit = 1.5 * math.log(student.vocab_size)
    holds = bool(losses) and all(math.isfinite(loss) and loss <= limit for loss in losses)
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    rows.held(f"{what}: mean loss", shown, f"{limit:.2f}", holds=holds)


def planned_memory(flags: Sequence[str], directory: Path) -> dict[str, int]:
    """Return the memory that `tools/plan_run.py` gives a run on one GPU, in bytes; raises RuntimeError when it cannot."""
    path = directory / "plan.json"
    words = [
        sys.executable,
        str(PLAN_RUN),
        *flags,
        "--world-size",
        "1",
        "--json",
        str(path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"plan_run.py ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    (stage,) = json.loads(read_text(path))["stages"]
    memory: dict[str, int] = stage["memory"]
    return memory


def _hold_plan(setting: Setting, rows: Rows, what: str, planned: int, peak: int) -> None:
    """Hold a plan against the peak of a step; on a CPU the peak is that of the whole process, and nothing is held."""
    name, shown = f"{what}: memory as planned", f"{planned / 2**30:.2f} GiB of {peak / 2**30:.2f}"
    if not setting.is_on_gpu:
        rows.measured(name, shown, planned=planned, peak=peak)
        return
    holds = abs(planned - peak) <= PLAN_ERROR * peak
    rows.held(name, shown, f"{PLAN_ERROR:.0%} off", holds=holds, planned=planned, peak=peak)


def _work(setting: Setting, flops: float) -> tuple[str]:
    import torch

    peak = peak_flops(torch.cuda.get_device_name()) if setting.is_on_gpu else None
    share = "" if peak is None else f", {100 * flops / peak:.1f} % MFU of the BF16 peak of {peak / 1e12:,.0f}"
    return (f"{flops / 1e12:.2f} TFLOP/s{share}",)


def let(setting: Setting, rows: Rows) -> None:
    """Measure the step with LET against the plain one, taking turns, and hold the difference against the floor."""
    from benchmark_measure import measure_let

    if setting.is_on_gpu and _is_exclusive():
        rows.not_run(
            "LET's overhead a step", "the GPU takes one process (exclusive mode); the two sides are two"
        )
        return
    bench = bench_of(setting, "let", repeats=5, steps=4)
    (measured,), _ = measure_let(bench, ["hf"])
    ratio, floor = float(measured["LET over plain"] or 0.0), flop_floor(bench.shape)
    overhead = ratio - 1.0
    what = "LET's overhead a step"
    shown = f"{100 * overhead:.1f} % ({measured['plain ms']} to {measured['LET ms']} ms), floor {100 * floor:.1f} %"
    values = {"overhead": overhead, "floor": floor}
    if not setting.is_on_gpu:  # steps of microseconds: only that it runs is of interest
        rows.measured(what, shown, **values)
        return
    bound = FLOOR_TIMES * floor
    rows.held(what, shown, f"{FLOOR_TIMES:g} x floor: {100 * bound:.1f} %", holds=overhead <= bound, **values)


def _is_exclusive() -> bool:
    """Return whether a process shuts others out of the GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    with suppress(OSError):
        return "Exclusive" in subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return False


def release(setting: Setting, rows: Rows) -> None:
    """See that S_stop gives the teacher's memory back."""
    import weakref

    from benchmark_inputs import write_hf_teacher

    bench = bench_of(setting, "release", repeats=1, steps=1)
    teacher_directory = bench.directory / "teacher"
    write_hf_teacher(teacher_directory, bench.shape.teacher)
    let = ["--let-teacher-load", str(teacher_directory), "--let-stop-iters", "3"]
    flags = [*bench.flags("run"), *let]
    with our_run(flags) as run:
        run.steps(2)
        weights = run.teacher_weights()
        size = sum(weight.nbytes for weight in weights)
        references = [weakref.ref(weight) for weight in weights]
        del weights
        peak_before, allocated_before = run.peak_memory(1), _allocated(setting)
        run.steps(1)  # the first after S_stop; the next is like all that follow
        peak_after, allocated_after = run.peak_memory(1), _allocated(setting)
    alive = sum(reference() is not None for reference in references)
    rows.held(
        "tensors of the teacher after S_stop",
        f"{alive} of {len(references)}",
        "0",
        holds=not alive,
        alive=alive,
    )
    planned = planned_memory(flags, bench.directory)
    _hold_plan(setting, rows, "with the teacher", planned["before_stop"], peak_before)
    _hold_plan(setting, rows, "after S_stop", planned["after_stop"], peak_after)
    if not setting.is_on_gpu:
        return
    bound = TEACHER_SHARE * size
    for what, freed in (
        ("memory given back at S_stop", allocated_before - allocated_after),
        ("peak of a step, lower by", peak_before - peak_after),
    ):
        shown, least = f"{freed / 2**20:.1f} MiB", f"the teacher's {bound / 2**20:.1f} MiB"
        rows.held(what, shown, least, holds=freed >= bound, freed=freed, teacher=size)


def _allocated(setting: Setting) -> int:
    """Return the bytes of CUDA tensors; 0 without a GPU."""
    import torch

    return torch.cuda.memory_allocated() if setting.is_on_gpu else 0


PARTS: Mapping[str, Callable[[Setting, Rows], None]] = {
    "environment": environment,
    "parity": parity,
    "steps-bf16": steps_bf16,
    "steps-fp8": steps_fp8,
    "let": let,
    "release": release,
    "resume": resume,
}


def main() -> int:
    """Run one part."""
    part, setting_file = sys.argv[1], Path(sys.argv[2])
    setting = Setting(**json.loads(read_text(setting_file)))
    rows = Rows(part, Path(setting.directory, f"{part}.json"))
    rows.guarded("the part", lambda: PARTS[part](setting, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
