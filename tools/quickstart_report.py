"""The quickstart's result: when LET reaches plain's final loss, what it cost, report.md and loss.png.

Used by tools/quickstart.py; the figures come from the `metrics.jsonl` of the three training runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

MIN_PARAMETER_RATIO = 8.0
"""The student must have at least so many times the teacher's transformer parameters."""


@dataclass(frozen=True)
class Point:
    """One validation: the iteration, seconds of training until then (evaluation left out), the loss."""

    iteration: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Crossing:
    """Where a curve first comes down to a loss, between two validations by a straight line."""

    iteration: float
    seconds: float


@dataclass(frozen=True)
class StepTimes:
    """Median time of an iteration in ms: the plain run, and LET's with the teacher and after it (None: no such part)."""

    plain: float
    with_teacher: float
    after_teacher: float | None


@dataclass(frozen=True)
class Facts:
    """What the report says besides the curves."""

    num_cores: int
    num_ranks: int
    teacher_parameters: int
    student_parameters: int
    step_times: StepTimes
    teacher_seconds: float
    """Seconds of training of the teacher."""
    step_seconds: Mapping[str, float]
    """Wall-clock of each step in seconds, start-up, evaluation and saving included, by title."""
    settings: Mapping[str, Mapping[str, Any]]
    """What was asked for, by headline."""
    commands: Sequence[str]
    notes: Sequence[str]


def read_curve(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the validations in the rows of a metrics.jsonl in order; of an iteration twice the last."""
    points = {
        int(row["iteration"]): Point(
            int(row["iteration"]), float(row["elapsed_seconds"]), float(row["validation_lm_loss"])
        )
        for row in rows
        if "validation_lm_loss" in row
    }
    return [points[iteration] for iteration in sorted(points)]


def find_crossing(curve: Sequence[Point], target: float) -> Crossing | None:
    """Return where the curve first comes down to `target`, or None when it never does.

    A curve that starts there has no earlier point to draw a line from: the answer is its first point.
    """
    before: Point | None = None
    for point in curve:
        if point.loss <= target:
            if before is None:
                return Crossing(float(point.iteration), point.seconds)
            share = (before.loss - target) / (before.loss - point.loss)
            return Crossing(
                before.iteration + share * (point.iteration - before.iteration),
                before.seconds + share * (point.seconds - before.seconds),
            )
        before = point
    return None


def verdict(plain: Sequence[Point], let: Sequence[Point]) -> str:
    """Return the one line that the quickstart ends with."""
    crossing = find_crossing(let, plain[-1].loss)
    if crossing is None:
        return f"LET does not reach plain's final validation loss (LET {let[-1].loss:.3f}, plain {plain[-1].loss:.3f})"
    return (
        "LET reaches plain's final validation loss in "
        f"{crossing.iteration / plain[-1].iteration:.1%} of its iterations and "
        f"{crossing.seconds / plain[-1].seconds:.1%} of its time"
    )


def step_times(plain: Sequence[Mapping[str, Any]], let: Sequence[Mapping[str, Any]]) -> StepTimes:
    """Return median iteration times from the training rows of both runs; the first row of each part is warm-up."""
    with_teacher = [row["iteration_ms"] for row in let if row.get("let_cosine") is not None]
    after = [row["iteration_ms"] for row in let if "lm_loss" in row and row["let_cosine"] is None]
    return StepTimes(
        plain=_median([row["iteration_ms"] for row in plain if "lm_loss" in row]),
        with_teacher=_median(with_teacher),
        after_teacher=_median(after) if after else None,
    )


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values[1:] if len(values) > 1 else values))


def transformer_parameters(settings: Mapping[str, Any]) -> int:
    """Return the parameters of the transformer layers, embeddings and final norm left out; no biases.

    `settings` are those of a run, names as on the command line with underscores.
    """
    layers, hidden, ffn, heads = (
        int(settings[name])
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    )
    groups = int(settings.get("num_query_groups", heads))
    attention = hidden * hidden * 2 + 2 * hidden * (hidden // heads) * groups  # q and output, k and v
    mlp = hidden * ffn * (3 if settings.get("swiglu") else 2)
    return layers * (attention + mlp + 2 * hidden)


def loss_table(plain: Sequence[Point], let: Sequence[Point]) -> list[str]:
    """Return a Markdown table of validation losses at the iterations that either run was validated at."""
    by_iteration = [{point.iteration: point for point in curve} for curve in (plain, let)]
    lines = ["| iteration | plain | LET | plain - LET |", "|---:|---:|---:|---:|"]
    for iteration in sorted(by_iteration[0].keys() | by_iteration[1].keys()):
        left, right = (points.get(iteration) for points in by_iteration)
        difference = "" if left is None or right is None else f"{left.loss - right.loss:+.3f}"
        cells = ["" if point is None else f"{point.loss:.3f}" for point in (left, right)]
        lines.append(f"| {iteration} | {cells[0]} | {cells[1]} | {difference} |")
    return lines


def render_report(
    plain: Sequence[Point], let: Sequence[Point], teacher: Sequence[Point], facts: Facts
) -> str:
    """Return report.md."""
    lines = ["# Quickstart: plain pretraining and LET, side by side", "", f"**{verdict(plain, let)}.**", ""]
    lines += ["![validation losses](loss.png)", "", *_sizes(facts), "", "## Validation loss", ""]
    lines += [*loss_table(plain, let), ""]
    lines += [f"The teacher's own final validation loss is {teacher[-1].loss:.3f}.", "", "## Time", ""]
    lines += [*_times(plain, let, facts), "", "## What this shows and what it does not", ""]
    lines += [*_limits(plain, let, facts), "", "## Settings", "", *_settings(facts)]
    lines += ["## Commands", "", "From the repository, one after the other:", "", "```bash"]
    lines += ["export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1"]
    return "\n".join([*lines, *facts.commands, "```"]) + "\n"


def _sizes(facts: Facts) -> list[str]:
    student, teacher = facts.student_parameters, facts.teacher_parameters
    return [
        f"A student of {student / 1e6:.2f}M transformer parameters was pretrained twice with the same seed and data "
        f"order: plain, and with LET from a teacher of {teacher / 1e6:.2f}M that was pretrained first "
        f"({student / teacher:.1f} times smaller). Machine: {facts.num_cores} CPU cores, {facts.num_ranks} gloo "
        "ranks with one thread each, fp32. Data: the Python standard library's own source files.",
    ]


def _times(plain: Sequence[Point], let: Sequence[Point], facts: Facts) -> list[str]:
    times = facts.step_times
    floor = facts.teacher_parameters / (3 * facts.student_parameters)
    after = "" if times.after_teacher is None else f", {times.after_teacher:.0f} ms once it is gone"
    return [
        f"An iteration (median) takes {times.plain:.0f} ms plain and {times.with_teacher:.0f} ms while LET's teacher "
        f"runs{after}: {times.with_teacher / times.plain - 1:+.1%}. The floor by FLOPs, teacher parameters / "
        f"(3 x student parameters), is {floor:+.1%}. The runs followed one another, so some percent of this are the "
        "machine's; tools/benchmark.py let times both in turns.",
        "",
        f"Training time, evaluation and saving left out: teacher {_clock(facts.teacher_seconds)}, plain "
        f"{_clock(plain[-1].seconds)}, LET {_clock(let[-1].seconds)}. Wall-clock of the steps, start-up, evaluation and saving included:",
        "",
        *(f"* {title}: {_clock(seconds)}" for title, seconds in facts.step_seconds.items()),
        f"* in all: {_clock(sum(facts.step_seconds.values()))}",
    ]


def _limits(plain: Sequence[Point], let: Sequence[Point], facts: Facts) -> list[str]:
    crossing = find_crossing(let, plain[-1].loss)
    paragraphs = [
        "One seed, one model shape, minutes of training: the two runs end far from convergence, and both final losses "
        "and the figure above move with the seed. The figure says how much sooner this student passes one loss with "
        "this teacher; it does not say how much LET gains at a size where pretraining costs money, nor what the "
        "student can do afterwards. The share of time is measured in two runs, one after the other: other work on the "
        "machine moves it, while the share of iterations stays.",
    ]
    if crossing is None:
        paragraphs.append("Here LET did not reach plain's final loss, so there is no speed-up to report.")
    else:
        with_teacher = (crossing.seconds + facts.teacher_seconds) / plain[-1].seconds
        paragraphs.append(
            "The teacher's own training is not in the figure: LET is meant for teachers that exist already. With the "
            f"teacher's {_clock(facts.teacher_seconds)} of training counted in, LET needs {with_teacher:.1%} of "
            "plain's time here."
        )
    paragraphs += list(facts.notes)
    return "\n\n".join(paragraphs).splitlines()


def _settings(facts: Facts) -> list[str]:
    lines: list[str] = []
    for headline, settings in facts.settings.items():
        lines += [f"{headline}:", "", "```yaml", *(f"{name}: {value}" for name, value in settings.items())]
        lines += ["```", ""]
    return lines


def draw(plain: Sequence[Point], let: Sequence[Point], stop_iteration: int, path: Path) -> None:
    """Write loss.png: both curves against iterations and against training time, S_stop and the crossing marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    target, crossing = plain[-1].loss, find_crossing(let, plain[-1].loss)
    stop_seconds = _seconds_at(let, stop_iteration)
    panels = (
        ("iteration", [p.iteration for p in plain], [p.iteration for p in let], float(stop_iteration)),
        ("training time (s)", [p.seconds for p in plain], [p.seconds for p in let], stop_seconds),
    )
    for axes, (label, plain_x, let_x, stop_x) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        axes.plot(plain_x, [point.loss for point in plain], marker=".", color="tab:gray", label="plain")
        axes.plot(let_x, [point.loss for point in let], marker=".", color="tab:blue", label="LET")
        axes.axhline(
            target, linestyle="--", linewidth=1, color="tab:gray", label=f"plain's final loss {target:.3f}"
        )
        axes.axvline(stop_x, linestyle=":", linewidth=1, color="tab:blue", label="S_stop: the teacher leaves")
        if crossing is not None:
            x = crossing.iteration if label == "iteration" else crossing.seconds
            axes.plot(
                [x], [target], marker="o", color="tab:red", linestyle="none", label=f"LET is there: {x:.0f}"
            )
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("validation loss")
    figure.savefig(path, dpi=130)


def _seconds_at(curve: Sequence[Point], iteration: int) -> float:
    """Return the training time at an iteration by a straight line between validations."""
    before = Point(0, 0.0, float("nan"))
    for point in curve:
        if point.iteration >= iteration:
            share = (iteration - before.iteration) / (point.iteration - before.iteration)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return before.seconds


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
