"""Measure this project: its training step against a bare PyTorch loop, LET against plain, memory, preprocessing.

    python tools/benchmark.py train  [--shape large] [--json docs/benchmarks/train-large.json]
    python tools/benchmark.py let    [--shape large]
    python tools/benchmark.py memory [--shape large-teacher]
    python tools/benchmark.py data   [--megatron-lm CHECKOUT]      # preprocessing, beside Megatron-LM's tool
    python tools/benchmark.py report            # put the tables of docs/benchmarks/*.json into docs/benchmarks.md

Competitors run in processes of their own on the same cores and take turns (A B A B) within one call, so a ratio holds
on a machine that others use too; absolute times do not. Runs on a GPU when there is one, else on CPU.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark_data import KINDS, measure_data
from benchmark_measure import (
    WARM_UP_STEPS,
    Bench,
    Measured,
    is_on_cpu,
    measure_let,
    measure_memory,
    measure_train,
)
from benchmark_report import Result, markdown, read_json, refresh, write_json
from benchmark_shapes import SHAPES

from megatron_let.regular_files import read_text

ROOT = Path(__file__).resolve().parents[1]
TEACHER_KINDS = ("hf", "megatron")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = _add(
        commands, "train", "our plain step against a bare PyTorch loop", shape="quickstart", repeats=12
    )
    train.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1, 2] if is_on_cpu() else [1],
        help="data-parallel sizes to measure",
    )
    let = _add(commands, "let", "the step with LET on against the plain one", shape="quickstart", repeats=12)
    memory = _add(
        commands,
        "memory",
        "peak memory with LET, without, and after S_stop",
        shape="large-teacher",
        repeats=3,
    )
    for with_teachers in (let, memory):
        with_teachers.add_argument(
            "--teachers", choices=TEACHER_KINDS, nargs="+", default=TEACHER_KINDS, help="kinds of teacher"
        )
    data = commands.add_parser("data", help="preprocessing against its floors and Megatron-LM's tool")
    data.add_argument("--megabytes", type=int, default=150, help="of JSON lines")
    data.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to measure")
    data.add_argument("--sides", choices=KINDS, nargs="+", default=KINDS, help="kinds of sides to measure")
    data.add_argument("--repeats", type=int, default=3, help="turns of each side")
    data.add_argument("--megatron-lm", type=Path, metavar="DIR", help="checkout of Megatron-LM core_v0.16.1")
    data.add_argument("--json", type=Path, help="write the figures to this file")
    report = commands.add_parser("report", help="make the tables of docs/benchmarks.md anew")
    report.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md")
    report.add_argument(
        "--results", type=Path, default=ROOT / "docs" / "benchmarks", help="directory of JSON files"
    )
    return parser.parse_args(argv)


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,
    *,
    shape: str,
    repeats: int,
) -> argparse.ArgumentParser:
    """Add a measuring subcommand with the options that all of them share."""
    parser = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default=shape)
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="turns of each side; fresh processes of memory"
    )
    parser.add_argument("--steps", type=int, default=4, help="training steps in a turn")
    parser.add_argument("--threads", type=int, default=1, help="of each rank on CPU")
    parser.add_argument("--fp32", action="store_true", help="on a GPU too, where bf16 is the default")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def measure(arguments: argparse.Namespace, directory: Path) -> Result:
    """Run a measuring subcommand, with its data and checkpoints in `directory`."""
    command = "python tools/benchmark.py " + shlex.join(sys.argv[1:])
    if arguments.command == "data":
        conditions, rows, notes = measure_data(
            directory,
            megabytes=arguments.megabytes,
            workers=arguments.workers,
            kinds=arguments.sides,
            repeats=arguments.repeats,
            megatron_lm=arguments.megatron_lm,
        )
        return Result("data", command, conditions, rows, notes)
    steps = 4 * arguments.steps if arguments.command == "memory" else arguments.repeats * arguments.steps
    bench = Bench(
        shape=SHAPES[arguments.shape],
        repeats=arguments.repeats,
        steps=arguments.steps,
        num_threads=arguments.threads,
        num_steps=WARM_UP_STEPS + steps,
        is_bf16=not (is_on_cpu() or arguments.fp32),
        directory=directory,
    )
    bench.write_tokens()
    runs: dict[str, Callable[[], Measured]] = {
        "train": lambda: measure_train(bench, arguments.ranks),
        "let": lambda: measure_let(bench, arguments.teachers),
        "memory": lambda: measure_memory(bench, arguments.teachers),
    }
    rows, notes = runs[arguments.command]()
    return Result(arguments.command, command, f"Shape {arguments.shape}; {bench.conditions()}", rows, notes)


def report(document: Path, directory: Path) -> None:
    """Make the tables of `document` anew from the JSON files in `directory`."""
    results = {path.name: read_json(path) for path in sorted(directory.glob("*.json"))}
    document.write_text(refresh(read_text(document), results), encoding="utf-8")
    print(f"wrote {document}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if arguments.command == "report":
        report(arguments.document, arguments.results)
        return 0
    with tempfile.TemporaryDirectory(prefix="benchmark_") as directory:
        result = measure(arguments, Path(directory))
    print(markdown(result))
    if arguments.json is not None:
        write_json(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
