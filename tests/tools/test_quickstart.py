"""The quickstart: its bookkeeping, its children's ends, and all of it once at a tiny size."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import quickstart
import torch.distributed.checkpoint as dcp
from quickstart_child import (
    ChildFailed,
    LogWatch,
    PlannedStep,
    ProgressLine,
    Status,
    TrainingWatch,
    run_child,
)
from quickstart_report import read_curve, transformer_parameters
from quickstart_steps import Step, build_steps, read_settings
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_let.errors import EXIT_BAD_CONFIGURATION, EXIT_DONE, ConfigError
from megatron_let.training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("full", "fast")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shipped_settings_can_be_trained_and_reported(variant: str) -> None:
    directory = ROOT / "scripts" / "quickstart" / variant
    settings = read_settings(directory)  # checks that the student is 8 times as large
    configs = [
        parse_arguments(["--config", str(directory / f"{name}.yaml")]) for name in ("teacher", "student")
    ]
    teacher, student = configs
    assert teacher.model.seq_length == student.model.seq_length
    assert student.validation.eval_interval is not None
    assert student.training.train_iters is not None
    assert 15 <= student.training.train_iters / student.validation.eval_interval <= 25
    assert 1 <= settings.let["let_stop_iters"] <= student.training.train_iters
    # An interval with and without teacher would blur the step times.
    assert settings.let["let_stop_iters"] % student.logging.log_interval == 0
    assert settings.let["let_student_layer"] <= student.transformer.num_layers
    parse_arguments(
        [word for step in build_steps(settings, Path("out"), 2)[5:] for word in step.commands[0][5:]]
    )


def test_a_student_too_small_for_its_teacher_is_refused(tiny: Path) -> None:
    (tiny / "student.yaml").write_text((tiny / "teacher.yaml").read_text())
    with pytest.raises(
        ConfigError, match=r"1\.0 times the teacher's transformer parameters; make it at least 8"
    ):
        read_settings(tiny)


def plan(*expected: float) -> ProgressLine:
    """Return a progress line over steps that are expected to take so many seconds."""
    steps = [
        PlannedStep(number, f"step {number}", seconds) for number, seconds in enumerate(expected, start=1)
    ]
    return ProgressLine(steps, len(steps), io.StringIO())


def test_the_time_left_starts_from_the_expectations() -> None:
    progress = plan(100.0, 50.0, 25.0)
    assert progress.seconds_left(None, progress._started) == 175.0


def test_the_time_left_of_later_steps_follows_the_pace_of_this_one() -> None:
    progress = plan(100.0, 50.0, 25.0)
    # 40 s gone and 160 s to go: twice the expectation, so the later steps count twice.
    assert progress.seconds_left(160.0, progress._started + 40.0) == pytest.approx(160.0 + 150.0)


def test_training_progress_is_read_off_the_metrics_file_whose_last_line_is_torn(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    watch = TrainingWatch(metrics, 100)
    assert watch() == Status("starting")
    rows = [
        {"iteration": 20, "lm_loss": 4.5, "iteration_ms": 250.0},
        {"iteration": 20, "validation_lm_loss": 4.25},
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 30, "lm_')
    status = watch()
    assert status.text == "iteration 20/100, loss 4.500, validation 4.250"
    assert status.seconds_left == pytest.approx(20.0)  # 80 iterations of 250 ms


def child(code: str, log: Path, progress: ProgressLine) -> None:
    """Run a line of Python as a step's program."""
    command = (sys.executable, "-c", code)
    run_child(
        command, cwd=log.parent, environment=dict(os.environ), log=log, watch=LogWatch(log), progress=progress
    )


def test_a_program_that_has_said_nothing_yet_is_starting(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert LogWatch(log)() == Status("starting")
    child("", log, plan(1.0))
    assert log.read_text().startswith("$ ")
    assert LogWatch(log)() == Status("starting")
    child("print('a word')", log, plan(1.0))
    assert LogWatch(log)() == Status("a word")


def test_a_failing_child_shows_its_last_lines_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ChildFailed, match="'step 1' ended with exit code 7") as failure:
        child("print('first'); print('the reason'); raise SystemExit(7)", tmp_path / "log", plan(1.0))
    assert failure.value.exit_code == 7
    assert "the reason" in capsys.readouterr().err


def test_a_child_killed_by_a_signal_gives_the_shells_exit_code(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed) as failure:
        child("import os; os.kill(os.getpid(), 9)", tmp_path / "log", plan(1.0))
    assert failure.value.exit_code == 128 + signal.SIGKILL


def test_an_interrupt_lets_the_child_save_and_then_ends(tmp_path: Path) -> None:
    saving = (
        "import pathlib, signal, sys, time\n"
        "def save(*_): pathlib.Path('saved').touch(); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )

    def interrupt_when_ready() -> Status:
        if (tmp_path / "ready").exists():
            raise KeyboardInterrupt
        return Status("")

    with pytest.raises(KeyboardInterrupt):
        run_child(
            (sys.executable, "-c", saving),
            cwd=tmp_path,
            environment=dict(os.environ),
            log=tmp_path / "log",
            watch=interrupt_when_ready,
            progress=plan(1.0),
        )
    assert (tmp_path / "saved").exists()


def steps_of(tiny: Path, output: Path) -> dict[str, Step]:
    """Return the steps of the tiny settings by name."""
    return {step.name: step for step in build_steps(read_settings(tiny), output, 1)}


def replace_in(path: Path, old: str, new: str) -> None:
    """Change a settings file."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "redone"),
    [
        ("teacher.yaml", "lr: 0.01", "lr: 0.02", {"teacher", "let"}),
        ("student.yaml", "lr: 0.01", "lr: 0.02", {"plain", "let"}),
        ("quickstart.yaml", "let_weight: 1", "let_weight: 2", {"let"}),
        (
            "quickstart.yaml",
            "vocab_size: 300",
            "vocab_size: 310",
            {"tokenizer", "data", "teacher", "plain", "let"},
        ),
        ("quickstart.yaml", "corpus: 1", "corpus: 2", set()),
    ],
)
def test_a_changed_setting_changes_the_steps_that_it_goes_into(
    tiny: Path, tmp_path: Path, file: str, old: str, new: str, redone: set[str]
) -> None:
    before = {name: step.key() for name, step in steps_of(tiny, tmp_path).items()}
    replace_in(tiny / file, old, new)
    after = {name: step.key() for name, step in steps_of(tiny, tmp_path).items()}
    assert {name for name in after if after[name] != before[name]} == redone


def test_only_a_training_run_is_kept_when_it_was_interrupted(tiny: Path, tmp_path: Path) -> None:
    steps = steps_of(tiny, tmp_path)
    for name in ("tokenizer", "plain"):
        steps[name].directory.mkdir()
        steps[name].write_stamp(key=steps[name].key(), seconds=1.0, is_done=False)
        quickstart._clear_what_is_stale(steps[name])
    assert not steps["tokenizer"].directory.exists()
    assert steps["plain"].directory.exists()
    replace_in(tiny / "student.yaml", "lr: 0.01", "lr: 0.02")
    quickstart._clear_what_is_stale(steps_of(tiny, tmp_path)["plain"])
    assert not steps["plain"].directory.exists()


def test_a_file_edited_while_its_step_runs_makes_the_step_stale(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("before")
    edit = f"import pathlib; print('edited'); pathlib.Path({str(source)!r}).write_text('after')"
    step = Step("corpus", "corpus", tmp_path / "corpus", (("-c", edit),), inputs=(source,))
    quickstart._run_step(step, tmp_path / "log", plan(1.0))
    assert step.stamp()["is_done"]
    assert not step.is_done()
    source.write_text("before")
    assert step.is_done()


def test_a_directory_that_is_not_ours_is_left_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    code = quickstart.main(["--settings", str(tiny), "--output", str(tmp_path)])
    assert code == EXIT_BAD_CONFIGURATION
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'data'} exists and is not from a quickstart; choose another --output\n"
    )
    assert (tmp_path / "data" / "precious").exists()


def test_two_quickstarts_keep_out_of_each_others_directory(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with quickstart.only_one(tmp_path):
        assert quickstart.main(["--settings", str(tiny), "--output", str(tmp_path)]) == EXIT_BAD_CONFIGURATION
    assert "a quickstart is at work in" in capsys.readouterr().err


MODEL = """
num-layers: {layers}
hidden-size: {hidden}
ffn-hidden-size: {hidden}
num-attention-heads: 2
seq-length: 32
position-embedding-type: rope
normalization: RMSNorm
swiglu: true
disable-bias-linear: true
untie-embeddings-and-output-weights: true
hidden-dropout: 0
attention-dropout: 0
train-iters: 6
micro-batch-size: 2
global-batch-size: 2
lr: 0.01
lr-decay-style: cosine
num-workers: 0
log-interval: 2
eval-interval: 2
eval-iters: 2
exit-signal-handler: true
"""


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return settings of a job of seconds over made-up source files."""
    directory = tmp_path_factory.mktemp("settings")
    source = directory / "source"
    source.mkdir()
    for index in range(60):
        lines = [
            f"def function_{index}_{line}(argument):\n    return argument + {line}\n" for line in range(20)
        ]
        (source / f"module_{index}.py").write_text("".join(lines))
    (directory / "teacher.yaml").write_text(MODEL.format(layers=1, hidden=16))
    (directory / "student.yaml").write_text(MODEL.format(layers=2, hidden=48))
    (directory / "quickstart.yaml").write_text(
        f"vocab_size: 300\nsource_dir: {source}\n"
        "let:\n  let_student_layer: 1\n  let_weight: 1\n  let_stop_iters: 4\n"
        "expected_seconds:\n  corpus: 1\n"
    )
    return directory


def test_the_whole_job_leaves_report_and_picture_and_a_second_call_starts_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--settings", str(tiny), "--output", str(tmp_path), "--ranks", "1"]
    assert quickstart.main(arguments) == EXIT_DONE
    first = capsys.readouterr().out.splitlines()
    assert first[-1].startswith("LET ")
    assert "plain's final validation loss" in first[-1]
    report = (tmp_path / "report.md").read_text()
    assert first[-1] in report
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    settings = read_settings(tiny)
    for name, values in (
        ("teacher", settings.teacher),
        ("plain", settings.student),
        ("let", settings.student),
    ):
        assert _stored_transformer_parameters(tmp_path / name / "iter_0000006") == transformer_parameters(
            values
        )
        assert (tmp_path / "logs" / f"{name}.log").exists()
    assert [row["iteration"] for row in _rows(tmp_path / "let") if row.get("let_cosine") is not None] == [
        2,
        4,
    ]
    assert [point.iteration for point in read_curve(_rows(tmp_path / "plain"))] == [2, 4, 6]

    monkeypatch.setattr(quickstart, "run_child", _must_not_run)
    assert quickstart.main(arguments) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[-1] == first[-1]


def _must_not_run(*_: object, **__: object) -> None:
    raise AssertionError("a child was started")


def _stored_transformer_parameters(checkpoint: Path) -> int:
    entries = dcp.FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    return sum(
        entry.size.numel()
        for name, entry in entries.items()
        if name.startswith("decoder.layers.") and isinstance(entry, TensorStorageMetadata)
    )


def _rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
