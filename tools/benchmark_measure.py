"""The measurements of `tools/benchmark.py`: which competitors start, what they are asked, and what is made of it."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_bare import BareSettings
from benchmark_inputs import write_hf_teacher, write_random_tokens
from benchmark_reference import GptShape
from benchmark_report import Cell, ratio_cells, step_ms
from benchmark_shapes import BenchmarkShape, flop_floor, loop_settings, training_flags
from benchmark_sides import Side, StepTime, open_side, take_turns

Measured = tuple[list[dict[str, Cell]], list[str]]
"""Rows of the table, and notes below it."""

OUR_RUN, BARE_RUN = "benchmark_ours:our_run", "benchmark_bare:bare_run"
WARM_UP_STEPS = 10
# fp32: some hundred roundings of 6e-8. bf16: the two round at other places, 2^-9 each.
FIRST_LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
# Mean of ten steps from one start: Adam turns roundings of near-zero gradients into whole steps of single weights.
LATER_LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}


@dataclass(frozen=True)
class Bench:
    """The settings that every benchmark shares."""

    shape: BenchmarkShape
    repeats: int
    steps: int
    num_threads: int
    num_steps: int
    """Of one side over the whole call, warm-up included."""

    is_bf16: bool
    directory: Path
    more_flags: tuple[str, ...] = ()
    """Of every run."""

    @property
    def precision(self) -> str:
        """Return `bf16` or `fp32`."""
        return "bf16" if self.is_bf16 else "fp32"

    def flags(self, name: str, *, world_size: int = 1, student: GptShape | None = None) -> list[str]:
        """Return the command line of run `name`, which has a save directory of its own."""
        loop = loop_settings(self.shape, world_size=world_size, is_fused=False, is_bf16=self.is_bf16)
        shape = self.shape.student if student is None else student
        # one more than is done: the last iteration of a run is logged outside the interval
        words = training_flags(shape, loop, world_size=world_size, num_steps=self.num_steps + 1)
        return [
            *words,
            *self.more_flags,
            *("--data-path", str(self.directory / "tokens"), "--split", "100,0,0"),
            *("--save", str(self.directory / name)),
        ]

    def open(self, stack: ExitStack, name: str, build: str, settings: Any, *, world_size: int = 1) -> Side:
        """Start a side that `stack` ends."""
        side = open_side(name, build, settings, world_size=world_size, num_threads=self.num_threads)
        return stack.enter_context(side)

    def take_turns(self, sides: Sequence[Side]) -> dict[str, list[list[StepTime]]]:
        """Warm the sides up, then measure them."""
        for side in sides:
            side.ask("steps", WARM_UP_STEPS)
        return take_turns(sides, repeats=self.repeats, steps=self.steps)

    def write_tokens(self) -> None:
        """Write the training data that `flags` name."""
        num_tokens = (self.num_steps + 1) * self.shape.tokens_per_step + 2 * self.shape.student.seq_length
        write_random_tokens(
            self.directory / "tokens", num_tokens=num_tokens, vocab_size=self.shape.student.vocab_size
        )

    def conditions(self) -> str:
        """Return what the figures depend on, in words."""
        device = f"{self.num_threads} thread(s) a rank, CPU with {torch.backends.cpu.get_cpu_capability()}"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        return (
            f"{device}, {self.precision}, torch {torch.__version__}, Python {platform.python_version()}; "
            f"{self.repeats} turns of {self.steps} steps each"
        )


def measure_train(bench: Bench, ranks: Sequence[int]) -> Measured:
    """Measure our plain step against the bare loop, on one rank and on several data-parallel ranks."""
    rows: list[dict[str, Cell]] = []
    differences: list[float] = []
    for world_size in ranks:
        with ExitStack() as stack:
            ours, *bare = _train_sides(bench, world_size, stack)
            differences += [_check_parity(bench, ours, side) for side in bare]
            times = bench.take_turns([ours, *bare])
            differences += [_check_later_losses(bench, ours, side) for side in bare]
        for side in bare:
            rows.append(
                {
                    "ranks": world_size,
                    "reference": side.name,
                    "our ms": step_ms(times["ours"]),
                    "its ms": step_ms(times[side.name]),
                    "our tokens/s": round(1e3 * bench.shape.tokens_per_step / step_ms(times["ours"])),
                    "its tokens/s": round(1e3 * bench.shape.tokens_per_step / step_ms(times[side.name])),
                    **ratio_cells(
                        "our speed over its", times[side.name], times["ours"], has_processor=is_on_cpu()
                    ),
                }
            )
    return rows, [
        f"Same weights, same tokens: losses of the two differ by at most {max(differences):.1e} relative."
    ]


def _train_sides(bench: Bench, world_size: int, stack: ExitStack) -> list[Side]:
    """Start our side, then the bare loop from our weights and tokens: with AdamW as it comes, and fused on CPU too."""
    name = f"ours-{world_size}"
    sides = [
        bench.open(stack, "ours", OUR_RUN, bench.flags(name, world_size=world_size), world_size=world_size)
    ]
    start = bench.directory / f"start-{world_size}.pt"
    sides[0].ask("export", start, bench.shape.student, bench.num_steps * bench.shape.global_batch_size)
    variants = {"bare": False, "bare, fused AdamW": True} if is_on_cpu() else {"bare": True}
    for title, is_fused in variants.items():
        loop = loop_settings(bench.shape, world_size=world_size, is_fused=is_fused, is_bf16=bench.is_bf16)
        settings = BareSettings(bench.shape.student, loop, start)
        sides.append(bench.open(stack, title, BARE_RUN, settings, world_size=world_size))
    return sides


def _check_parity(bench: Bench, ours: Side, bare: Side) -> float:
    """Assert that both give the same loss from the same weights; return the relative difference."""
    expected = statistics.mean(bare.ask("first_loss"))
    difference = abs(ours.ask("first_loss")[0] - expected) / expected
    tolerance = FIRST_LOSS_TOLERANCE[bench.precision]
    assert difference <= tolerance, f"first loss differs from {bare.name}'s by {difference:.2e} > {tolerance}"
    return float(difference)


def _check_later_losses(bench: Bench, ours: Side, bare: Side) -> float:
    """Assert that both have followed the same course since; return the largest relative difference."""
    expected = [statistics.mean(of_ranks) for of_ranks in zip(*bare.ask("losses"), strict=True)]
    actual = ours.ask("losses")[0]
    differences = [abs(left - right) / right for left, right in zip(actual, expected, strict=True)]
    tolerance = LATER_LOSS_TOLERANCE[bench.precision]
    assert max(differences) <= tolerance, (
        f"losses differ from {bare.name}'s by {max(differences):.2e} > {tolerance}"
    )
    return max(differences)


def measure_let(bench: Bench, kinds: Sequence[str]) -> Measured:
    """Measure the step with LET on against the plain one, for each kind of teacher."""
    teachers = _write_teachers(bench, kinds)
    with ExitStack() as stack:
        plain = bench.open(stack, "plain", OUR_RUN, bench.flags("plain"))
        sides = [
            bench.open(stack, kind, OUR_RUN, _let_flags(bench, kind, teacher))
            for kind, teacher in teachers.items()
        ]
        times = bench.take_turns([plain, *sides])
    rows: list[dict[str, Cell]] = [
        {
            "teacher": side.name,
            "plain ms": step_ms(times["plain"]),
            "LET ms": step_ms(times[side.name]),
            **ratio_cells("LET over plain", times[side.name], times["plain"], has_processor=is_on_cpu()),
            "FLOP floor": round(1.0 + flop_floor(bench.shape), 3),
        }
        for side in sides
    ]
    return rows, [
        "FLOP floor: 1 + N_T / (3 N_S). N_T: the teacher's body, without embedding and LM head. N_S: the student's "
        "body and LM head, without the embedding, which is looked up and not multiplied."
    ]


def _let_flags(bench: Bench, kind: str, teacher: Path, *, stop_iterations: int | None = None) -> list[str]:
    return [
        *bench.flags(f"let-{kind}"),
        *("--let-teacher-load", str(teacher)),
        *("--let-stop-iters", str(stop_iterations or bench.num_steps)),
    ]


def _write_teachers(bench: Bench, kinds: Sequence[str]) -> dict[str, Path]:
    """Write a teacher of each kind and return its directory: `hf` at random, `megatron` by training one step."""
    directories = {kind: bench.directory / f"teacher-{kind}" for kind in kinds}
    if "hf" in directories:
        write_hf_teacher(directories["hf"], bench.shape.teacher)
    if "megatron" in directories:
        flags = bench.flags("teacher-megatron", student=bench.shape.teacher)
        with open_side("teacher", OUR_RUN, [*flags, "--exit-interval", "1"]) as side:
            side.ask("fit")
    return directories


def measure_memory(bench: Bench, kinds: Sequence[str]) -> Measured:
    """Measure the peak memory of a run that releases its teacher, before and after, and of a plain run."""
    measured: dict[str, list[tuple[int, int]]] = {}
    teachers = _write_teachers(bench, kinds)
    for _ in range(bench.repeats):
        for kind in ("none", *teachers):
            flags = bench.flags("plain")
            if kind != "none":
                flags = _let_flags(bench, kind, teachers[kind], stop_iterations=2 * bench.steps)
            with open_side(kind, OUR_RUN, flags, num_threads=bench.num_threads) as side:
                measured.setdefault(kind, []).append(_early_and_late_peak(side, bench.steps))
    plain = _median_megabytes(measured["none"])
    rows: list[dict[str, Cell]] = []
    for kind, pairs in measured.items():
        early, late = _median_megabytes(pairs)
        rows.append(
            {
                "teacher": kind,
                "MB before S_stop": early,
                "MB after": late,
                "over plain before": round(early - plain[0], 1),
                "over plain after": round(late - plain[1], 1),
            }
        )
    what = "resident memory" if is_on_cpu() else "memory of CUDA tensors"
    return rows, [
        f"Peak {what} of a rank over {bench.steps} steps; medians over {bench.repeats} fresh processes."
    ]


def _early_and_late_peak(side: Side, steps: int) -> tuple[int, int]:
    """Return the peaks in bytes over `steps` steps before S_stop = 2 * steps and over as many after it."""
    side.ask("steps", steps)
    early = max(side.ask("peak_memory", steps))
    side.ask("steps", steps)
    return early, max(side.ask("peak_memory", steps))


def _median_megabytes(pairs: Sequence[tuple[int, int]]) -> tuple[float, float]:
    early, late = (round(statistics.median(values) / 1e6, 1) for values in zip(*pairs, strict=True))
    return early, late


def is_on_cpu() -> bool:
    """Return whether runs of this machine train on the CPU."""
    return not torch.cuda.is_available()
