"""A plan as text for people: one pipeline stage a row, then teacher, time, data and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_let.planning.plan import RunPlan, StagePlan, TeacherPlan

GIB = 2**30

_HEADINGS = (
    *("stage", "ranks", "layers", "parameters", "weights", "gradients", "optimizer", "activations"),
    *("teacher", "in its work", "states", "before S_stop", "after", "TFLOP before", "after"),
)


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """Yield the lines of a plan."""
    yield f"{plan.world_size} ranks: " + ", ".join(f"{name} {size}" for name, size in plan.layout.items())
    yield f"student: {plan.parameters:,} parameters, vocabulary padded to {plan.padded_vocab_size:,}"
    yield ""
    yield "one rank of each pipeline stage; memory in GiB, TFLOP of one microbatch, before and after S_stop"
    yield from _columns([_HEADINGS, *(_row(stage) for stage in plan.stages)])
    if plan.teacher is not None:
        yield ""
        yield from _teacher(plan.teacher)
    yield ""
    yield from _run(plan)
    yield from (f"warning: {warning}" for warning in plan.warnings)
    yield from (f"not planned: {what}" for what in plan.not_planned)


def _row(stage: StagePlan) -> tuple[str, ...]:
    memory = stage.memory
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    teacher = (memory.teacher_weights, memory.teacher_peak, memory.teacher_states)
    peaks = (memory.before_stop, memory.after_stop)
    marks = "e" * stage.has_embedding + "h" * stage.has_head
    return (
        f"{stage.stage}{marks}",
        f"{stage.ranks[0]}-{stage.ranks[1]}",
        _numbers(stage.layers),
        f"{stage.parameters:,}",
        *(f"{size / GIB:.2f}" for size in (*sizes, *teacher, *peaks)),
        *(f"{flops / 1e12:.2f}" for flops in (stage.flops + stage.teacher_flops, stage.flops)),
    )


def _numbers(layers: Sequence[int]) -> str:
    """Return layer numbers as ranges: 1-2,9-10."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "none"


def _teacher(teacher: TeacherPlan) -> Iterator[str]:
    yield f"teacher: {teacher.description}"
    yield (
        f"  guides layer {teacher.student_layer} on stage {teacher.stage} until iteration {teacher.stop_iteration}; "
        f"{teacher.weights_bytes / GIB:.2f} GiB, {teacher.flops_per_token / 1e9:.2f} GFLOP a token, "
        f"{teacher.share_of_flops:.1%} of the student's work"
    )
    shares = ", ".join(
        f"{who} {ratio - 1:+.1%}" + ("" if who in teacher.allowed else " (planned only)")
        for who, ratio in teacher.slowdown.items()
    )
    yield f"  time of an iteration, by who computes the teacher (--let-share-teacher, here {teacher.share}): {shares}"


def _run(plan: RunPlan) -> Iterator[str]:
    work, time, data = plan.work, plan.time, plan.data
    yield (
        f"work: {work.iterations:,} iterations, {work.tokens:,} tokens; {work.flops_per_iteration:.4g} FLOP an "
        "iteration on all ranks, recomputation and teacher not counted"
    )
    if time is not None:
        guided = time.seconds_per_iteration_with_teacher
        yield (
            f"time: {time.days:.2f} days; {time.seconds_per_iteration:.3g} s an iteration"
            + ("" if guided is None else f", {guided:.3g} s with the teacher")
            + f", at {time.tflops_per_device:.4g} TFLOP/s a device ({time.source})"
        )
    for split, needed in data.needed.items():
        present = data.present[split]
        there = "made up" if data.is_made_up else "not counted: see the warnings"
        there = there if present is None else f"{present:,} present"
        epochs = data.epochs[split]
        read = "" if epochs is None else f", {epochs:.2f} epochs of the data set that is read most often"
        if needed:
            yield f"data: {split} needs {needed:,} tokens, {there}{read}"
    yield f"checkpoint: {plan.checkpoint_bytes / GIB:.2f} GiB each"
    better = plan.better_split
    if better is not None:
        layers = ",".join(str(count) for count in better.layers)
        replaced = f" in place of {' '.join(better.replaced)}" if better.replaced else ""
        yield f"better split: {better.flags}{replaced} (layers {layers}) saves {better.saved:.1%} of the run's time"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
