"""The quickstart's steps: what each runs, where its result lies, and when a result of an earlier call still holds.

Used by tools/quickstart.py. A settings directory (scripts/quickstart/full, fast) holds teacher.yaml and student.yaml,
which `pretrain_let.py --config` reads as they are, and quickstart.yaml with the rest.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quickstart_report import MIN_PARAMETER_RATIO, transformer_parameters

from megatron_let import __version__
from megatron_let.config.command_line import read_yaml
from megatron_let.errors import ConfigError
from megatron_let.regular_files import read_bytes, read_text
from megatron_let.training.checkpoint_files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
STAMP = "quickstart_step.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Settings:
    """What a directory of settings says; names of flags with underscores."""

    directory: Path
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    let: Mapping[str, Any]
    vocab_size: int
    source_dir: Path
    expected_seconds: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """A part of the job that fills one directory, and is redone when what goes into it has changed."""

    name: str
    title: str
    directory: Path
    commands: tuple[tuple[str, ...], ...]
    """Words after `python`, run from the repository's root."""
    inputs: tuple[Path, ...] = ()
    """Files whose content decides the result, results of other steps left out."""
    versions: tuple[str, ...] = ()
    needs: tuple[Step, ...] = ()
    train_iters: int | None = None
    """Length of a training run, which can go on where it was interrupted."""

    def key(self) -> str:
        """Return a digest of all that goes into this step and the steps that it needs."""
        files = [hashlib.sha256(read_bytes(ROOT / path)).hexdigest() for path in self.inputs]
        parts = [self.commands, files, self.versions, [step.key() for step in self.needs]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def stamp(self) -> dict[str, Any]:
        """Return what an earlier call noted: `key`, `seconds`, `is_done`; empty when there is nothing."""
        try:
            return dict(json.loads(read_text(ROOT / self.directory / STAMP)))
        except (OSError, ValueError):
            return {}

    def is_done(self) -> bool:
        """Return whether the directory holds this step's result."""
        stamp = self.stamp()
        return bool(stamp.get("is_done")) and stamp.get("key") == self.key()

    def write_stamp(self, *, key: str, seconds: float, is_done: bool) -> None:
        """Note how far this step is, the seconds that it took, and the `key` it had when it began."""
        stamp = {"key": key, "is_done": is_done, "seconds": round(seconds, 2)}
        write_atomically(ROOT / self.directory / STAMP, json.dumps(stamp) + "\n")


def read_settings(directory: Path) -> Settings:
    """Read quickstart.yaml, teacher.yaml and student.yaml.

    Raises:
        ConfigError: one is missing or malformed, or the student is not large enough beside the teacher.
    """
    content = read_yaml(str(directory / "quickstart.yaml"))
    missing = [name for name in ("vocab_size", "let", "expected_seconds") if name not in content]
    if missing:
        raise ConfigError(f"{directory / 'quickstart.yaml'} lacks {', '.join(missing)}")
    teacher, student = (
        {name.replace("-", "_"): value for name, value in read_yaml(str(directory / file)).items()}
        for file in ("teacher.yaml", "student.yaml")
    )
    ratio = transformer_parameters(student) / transformer_parameters(teacher)
    if ratio < MIN_PARAMETER_RATIO:
        raise ConfigError(
            f"the student in {directory} has {ratio:.1f} times the teacher's transformer parameters; make it at least "
            f"{MIN_PARAMETER_RATIO:.0f} times as large"
        )
    return Settings(
        directory=directory,
        teacher=teacher,
        student=student,
        let=content["let"],
        vocab_size=int(content["vocab_size"]),
        source_dir=Path(content.get("source_dir") or sysconfig.get_path("stdlib")),
        expected_seconds=content["expected_seconds"],
        notes=tuple(content.get("notes") or ()),
    )


def build_steps(settings: Settings, output: Path, num_ranks: int) -> list[Step]:
    """Return all steps in order; `output` is relative to the repository where it lies inside."""
    corpus, tokenizer, data = _data_steps(settings, output, num_ranks)
    teacher = _training_step(
        "teacher", "teacher", settings, output, needs=(data,), num_ranks=num_ranks, flags=()
    )
    plain = _training_step(
        "plain", "student, plain", settings, output, needs=(data,), num_ranks=num_ranks, flags=()
    )
    let_flags = ["--let-teacher-load", str(teacher.directory)]
    for name, value in settings.let.items():
        let_flags += [f"--{name.replace('_', '-')}", str(value)]
    let = _training_step(
        "let",
        "student, with LET",
        settings,
        output,
        needs=(data, teacher),
        num_ranks=num_ranks,
        flags=let_flags,
    )
    return [corpus, tokenizer, data, teacher, plain, let]


def _data_steps(settings: Settings, output: Path, num_workers: int) -> tuple[Step, Step, Step]:
    """Return the steps before training: source files to tokens."""
    source = ("--source-dir", str(settings.source_dir))
    corpus = Step(
        "corpus",
        "corpus",
        output / "corpus",
        (("tools/build_stdlib_corpus.py", *source, "--output-dir", str(output / "corpus")),),
        inputs=(Path("tools/build_stdlib_corpus.py"),),
        versions=(platform.python_version(),),
    )
    train, valid = (str(corpus.directory / f"{split}.jsonl") for split in ("train", "valid"))
    size = ("--vocab-size", str(settings.vocab_size))
    tokenizer = Step(
        "tokenizer",
        "tokenizer",
        output / "tokenizer",
        (("tools/train_tokenizer.py", "--input", train, *size, "--output-dir", str(output / "tokenizer")),),
        inputs=(Path("tools/train_tokenizer.py"),),
        needs=(corpus,),
    )
    common = (*_tokenizer_flags(tokenizer.directory), "--append-eod", "--workers", str(num_workers))
    data = Step(
        "data",
        "tokens",
        output / "data",
        tuple(
            (
                "tools/preprocess_data.py",
                "--input",
                file,
                "--output-prefix",
                str(output / "data" / split),
                *common,
            )
            for split, file in (("train", train), ("valid", valid))
        ),
        needs=(corpus, tokenizer),
    )
    return corpus, tokenizer, data


def _training_step(
    name: str,
    title: str,
    settings: Settings,
    output: Path,
    *,
    needs: tuple[Step, ...],
    num_ranks: int,
    flags: Sequence[str],
) -> Step:
    """Return the step of one training run: the settings file, the data, where to save, and `flags`."""
    model, values = ("teacher", settings.teacher) if name == "teacher" else ("student", settings.student)
    config, directory, data = settings.directory / f"{model}.yaml", output / name, output / "data"
    command = (
        *("-m", "megatron_let.launch", "--nproc-per-node", str(num_ranks), "pretrain_let.py"),
        *("--config", str(config)),
        *_tokenizer_flags(output / "tokenizer"),
        *("--train-data-path", str(data / "train_text_document")),
        *("--valid-data-path", str(data / "valid_text_document")),
        *("--data-cache-path", str(data / "cache")),
        *("--save", str(directory), "--load", str(directory)),
        *flags,
    )
    versions = tuple(version(package) for package in ("torch", "megatron-core"))
    return Step(
        name,
        title,
        directory,
        (command,),
        inputs=(config,),
        versions=(__version__, *versions),
        needs=needs,
        train_iters=int(values["train_iters"]),
    )


def _tokenizer_flags(directory: Path) -> tuple[str, ...]:
    return ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(directory))
