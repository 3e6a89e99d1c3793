"""The main job from nothing to a picture: corpus, tokenizer, data, teacher, student without and with LET, report.

    python tools/quickstart.py            # at most 15 minutes on two cores; scripts/quickstart.sh makes .venv first
    python tools/quickstart.py --fast     # a smaller variant, 3 minutes

Each training run is an ordinary job, described by a file in scripts/quickstart/full (or fast). What is there already
and was made with the same settings is used again; an interrupted training run goes on where it was.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quickstart_child import (
    LogWatch,
    PlannedStep,
    ProgressLine,
    Status,
    TrainingWatch,
    last_lines,
    read_rows,
    run_child,
    signals_as_interrupt,
)
from quickstart_report import (
    Facts,
    draw,
    read_curve,
    render_report,
    step_times,
    transformer_parameters,
    verdict,
)
from quickstart_steps import METRICS, ROOT, Settings, Step, build_steps, read_settings

from megatron_let.errors import EXIT_DONE, ConfigError, LetError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--fast", action="store_true", help="the smaller variant")
    parser.add_argument(
        "--output", type=Path, help="directory (default runs/quickstart, with --fast runs/quickstart-fast)"
    )
    parser.add_argument("--ranks", type=int, default=min(2, count_cores()), help="default 2, on one core 1")
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def count_cores() -> int:
    """Return the number of CPU cores that this program may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def run(settings: Settings, output: Path, num_ranks: int) -> str:
    """Do all steps that are not done, write report and picture, and return the line with the figure.

    Raises:
        ConfigError: something that is not ours is in the way.
        ChildFailed: a step failed.
    """
    steps = build_steps(settings, output, num_ranks)
    logs = ROOT / output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for step in steps:
        _clear_what_is_stale(step)
    is_done = {step.name: step.is_done() for step in steps}
    plan = [
        PlannedStep(number, step.title, float(settings.expected_seconds.get(step.name, 10.0)))
        for number, step in enumerate(steps, start=1)
        if not is_done[step.name]
    ]
    progress = ProgressLine(plan, len(steps), sys.stdout)
    for number, step in enumerate(steps, start=1):
        if is_done[step.name]:
            progress.end_line(
                f"[{number}/{len(steps)}] {step.title}: done already, used again ({step.directory})"
            )
        else:
            _run_step(step, logs / f"{step.name}.log", progress)
    return _write_report(settings, steps, output, num_ranks)


def _clear_what_is_stale(step: Step) -> None:
    """Remove what earlier calls left of this step, unless it is its result or a training run that can go on."""
    directory = ROOT / step.directory
    if not directory.exists():
        return
    stamp = step.stamp()
    if not stamp:
        raise ConfigError(f"{step.directory} exists and is not from a quickstart; choose another --output")
    if stamp["key"] == step.key() and (stamp["is_done"] or step.train_iters is not None):
        return
    shutil.rmtree(directory)


def _run_step(step: Step, log: Path, progress: ProgressLine) -> None:
    """Run the commands of a step and stamp its directory, also when it is interrupted."""
    directory = ROOT / step.directory
    is_resumed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    earlier = float(step.stamp().get("seconds", 0.0))
    # Of now: what is edited while the step runs did not go into it.
    started, key = time.monotonic(), step.key()
    step.write_stamp(key=key, seconds=earlier, is_done=False)
    if not is_resumed:
        log.unlink(missing_ok=True)
    watch: Callable[[], Status] = LogWatch(log)
    if step.train_iters is not None:
        watch = TrainingWatch(directory / METRICS, step.train_iters)
    try:
        for command in step.commands:
            run_child(
                (sys.executable, *command),
                cwd=ROOT,
                environment=_environment(),
                log=log,
                watch=watch,
                progress=progress,
            )
    finally:
        step.write_stamp(key=key, seconds=earlier + time.monotonic() - started, is_done=False)
    step.write_stamp(key=key, seconds=earlier + time.monotonic() - started, is_done=True)
    text = watch().text if step.train_iters is not None else last_lines(log, 1)[-1]
    progress.finish_step(f"{text} ({time.monotonic() - started:.0f} s)")


def _environment() -> dict[str, str]:
    """Return the environment of the children: CPU only, one thread a rank, no network."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore::UserWarning",
    }


def _write_report(settings: Settings, steps: Sequence[Step], output: Path, num_ranks: int) -> str:
    """Write report.md and loss.png; return the line with the figure."""
    rows = {step.name: read_rows(ROOT / step.directory / METRICS) for step in steps[-3:]}
    teacher, plain, let = (read_curve(rows[name]) for name in ("teacher", "plain", "let"))
    stop_iteration = int(settings.let["let_stop_iters"])
    facts = Facts(
        num_cores=count_cores(),
        num_ranks=num_ranks,
        teacher_parameters=transformer_parameters(settings.teacher),
        student_parameters=transformer_parameters(settings.student),
        step_times=step_times(rows["plain"], rows["let"]),
        teacher_seconds=teacher[-1].seconds,
        step_seconds={step.title: float(step.stamp()["seconds"]) for step in steps},
        settings={"Teacher": settings.teacher, "Student": settings.student, "LET": settings.let},
        commands=[shlex.join(("python", *command)) for step in steps for command in step.commands],
        notes=settings.notes,
    )
    draw(plain, let, stop_iteration, ROOT / output / "loss.png")
    report = ROOT / output / "report.md"
    report.write_text(render_report(plain, let, teacher, facts), encoding="utf-8")
    print(f"report: {output / 'report.md'}, picture: {output / 'loss.png'}")
    return verdict(plain, let)


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keep a second quickstart out of the same directory.

    Raises:
        ConfigError: one is at work there.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"a quickstart is at work in {output}; wait for it or choose another --output"
            ) from None
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    arguments = parse_arguments(argv)
    variant = "fast" if arguments.fast else "full"
    directory = _from_root(arguments.settings or ROOT / "scripts" / "quickstart" / variant)
    default = ROOT / "runs" / ("quickstart-fast" if arguments.fast else "quickstart")
    output = _from_root(arguments.output or default)
    try:
        with signals_as_interrupt(), only_one(ROOT / output):
            line = run(read_settings(directory), output, arguments.ranks)
    except LetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(line)
    return EXIT_DONE


def _from_root(path: Path) -> Path:
    """Return a path relative to the repository's root where it lies inside, which makes commands readable."""
    absolute = path.resolve()
    return absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute


if __name__ == "__main__":
    sys.exit(main())
