"""What a plan says beside memory: work, time, the teacher's cost, data, checkpoints, and all that is wrong at once."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan_run
import pytest

import pretrain_let
from megatron_let.config.batches import padded_vocab_size
from megatron_let.config.checks.let import ALLOWED_NOW
from megatron_let.entry import RunReport
from megatron_let.log import LOGGER
from megatron_let.planning.flops import training_flops_per_token
from megatron_let.planning.table import GIB, plan_lines
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments, train
from megatron_let.training.arguments import parse_arguments
from tests.training.planned import MOCK, plan_of, problems_of

PIPELINE = {"--pipeline-model-parallel-size": 2}
TENSOR = {"--tensor-model-parallel-size": 2}
FULL = {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}
# Of the tiny student's size, so that its stage cannot but be the slowest.
TEACHER_SHAPE = {"hidden_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give back what the program sets up for its whole process: the package's logger, GPUs out of sight."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    handlers, level, propagate = list(LOGGER.handlers), LOGGER.level, LOGGER.propagate
    yield
    LOGGER.handlers[:] = handlers
    LOGGER.setLevel(level)
    LOGGER.propagate = propagate


@pytest.fixture(scope="module")
def described_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that holds a config.json alone."""
    import transformers

    directory = tmp_path_factory.mktemp("described")
    transformers.LlamaConfig(vocab_size=61, max_position_embeddings=64, **TEACHER_SHAPE).save_pretrained(
        directory
    )
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"--fp16": None, "--check-for-large-grads": None}),
        (1, {"--distributed-backend": "gloo"}),  # weight gradients are added in place
        (4, {**TENSOR, **PIPELINE}),
        (4, {**TENSOR, "--sequence-parallel": None, "--context-parallel-size": 2}),
        (2, {**PIPELINE, "--num-virtual-stages-per-pipeline-rank": 2}),
    ],
)
def test_the_stages_together_do_the_work_of_the_student(world_size: int, changes: dict[str, Any]) -> None:
    flags = {**MOCK, **changes}
    plan = plan_of(flags, world_size)
    sharing = plan.layout["tensor"] * plan.layout["context"]
    tokens = plan.layout["micro batch"] * plan.layout["sequence"]
    config = parse_arguments(arguments(TINY_STUDENT, flags))
    expected = tokens * training_flops_per_token(config, plan.padded_vocab_size)
    assert plan.padded_vocab_size == padded_vocab_size(61, 24, plan.layout["tensor"])
    assert sum(stage.flops for stage in plan.stages) * sharing == pytest.approx(expected)


@pytest.mark.parametrize("share", [2, 4])
def test_context_parallel_ranks_keep_their_own_share_of_the_sequence(share: int) -> None:
    alone = plan_of({**MOCK, "--seq-length": 64}).stages[0].memory
    flags = {**MOCK, "--seq-length": 64 * share, "--context-parallel-size": share}
    memory = plan_of(flags, share).stages[0].memory
    # beside the share a rank holds the angles of the whole row
    assert memory.activations == pytest.approx(alone.activations, rel=0.02)


def test_full_recompute_does_each_layer_s_forward_twice() -> None:
    plain, full = plan_of(MOCK).stages[0], plan_of({**MOCK, **FULL}).stages[0]
    head = 3 * 2 * 32 * 48 * 72
    # three thirds become four, but for the last product of a layer, whose result nobody needs
    assert 0.9 < (full.flops - plain.flops) / ((plain.flops - head) / 3) <= 1


def test_a_teacher_needs_no_weights(described_teacher: Path, tmp_path: Path) -> None:
    plan = plan_of({**MOCK, "--let-teacher-load": described_teacher, "--let-stop-fraction": 0.4})
    teacher, memory = plan.teacher, plan.stages[0].memory
    assert teacher is not None
    layer = 4 * 48 * 48 + 3 * 48 * 96 + 2 * 48
    assert teacher.weights_bytes == memory.teacher_weights == 4 * (61 * 48 + 8 * layer + 48)
    assert (teacher.student_layer, teacher.stage, teacher.stop_iteration) == (1, 0, 2)
    attention = 2 * 2 * 48 * 32 / 2
    products = 2 * (4 * 48 * 48 + 3 * 48 * 96)
    assert teacher.flops_per_token == pytest.approx(8 * (products + attention), rel=2e-3)  # rotary angles
    assert memory.teacher_states == 32 * 48 * 4
    assert memory.before_stop == memory.after_stop + memory.teacher_weights + memory.teacher_peak
    middle = plan_of({**MOCK, "--let-teacher-load": described_teacher, "--let-teacher-layer": 4})
    assert middle.teacher is not None
    assert middle.teacher.weights_bytes == 4 * (61 * 48 + 4 * layer + 48)


def test_the_angles_of_the_positions_are_there_with_and_without_a_teacher(described_teacher: Path) -> None:
    angles = 4 * 2048 * 384  # far more than the teacher's work takes
    wide = {"--num-layers": 1, "--hidden-size": 1536, "--ffn-hidden-size": 2048, "--seq-length": 2048}
    memory = plan_of({**MOCK, **wide, "--let-teacher-load": described_teacher}).stages[0].memory
    assert 0 < memory.teacher_peak < angles


def test_a_checkpoint_is_a_teacher_too(megatron_teacher: Path, tmp_path: Path) -> None:
    described = tmp_path / "teacher"
    shutil.copytree(megatron_teacher, described, ignore=shutil.ignore_patterns("*.distcp"))
    plan = plan_of({**MOCK, "--let-teacher-load": described})
    assert plan.teacher is not None
    # the tiny student again, without its output layer
    assert plan.teacher.weights_bytes == 4 * (plan.parameters - 72 * 48)


def test_a_teacher_on_the_slowest_stage_is_told_and_a_better_split_helps(described_teacher: Path) -> None:
    flags = {**MOCK, **PIPELINE, "--num-layers": 12, "--let-teacher-load": described_teacher}
    flags |= {"--let-student-layer": 2, "--let-stop-fraction": 1}
    plan = plan_of(flags, 2)
    assert plan.teacher is not None
    assert plan.time is not None
    assert plan.better_split is not None
    assert plan.teacher.is_bottleneck
    assert not plan.teacher.is_on_slowest
    assert any(
        "layer k = 2 is on stage 0, which the teacher makes the slowest" in line for line in plan.warnings
    )
    assert plan.teacher.slowdown["none"] > plan.teacher.slowdown["tensor-pipeline"] > 1
    first, last = plan.better_split.layers
    assert first < 6 < last
    proposed = plan.better_split.flags.split()
    better = plan_of({**flags, **dict(zip(proposed[::2], proposed[1::2], strict=True))}, 2)
    assert better.better_split is None
    assert [len(stage.layers) for stage in better.stages] == [first, last]


def test_a_teacher_elsewhere_than_on_the_slowest_stage_is_not_warned_of(teacher: Path) -> None:
    flags = {**MOCK, **PIPELINE, "--num-layers": 12, "--decoder-last-pipeline-num-layers": 11}
    plan = plan_of({**flags, "--let-teacher-load": teacher, "--let-student-layer": 1}, 2)
    assert plan.teacher is not None
    assert not plan.teacher.is_bottleneck
    assert not any("slowest" in line for line in plan.warnings)


def test_a_teacher_on_a_stage_that_was_the_slowest_does_not_make_it_so(teacher: Path) -> None:
    flags = {**MOCK, **PIPELINE, "--decoder-first-pipeline-num-layers": 3, "--let-teacher-load": teacher}
    (warning,) = plan_of({**flags, "--let-student-layer": 1}, 2).warnings
    assert warning.startswith("layer k = 1 is on the slowest stage, 0, and the teacher slows it down: +")


def test_one_stage_is_no_bottleneck(teacher: Path) -> None:
    plan = plan_of({**MOCK, "--let-teacher-load": teacher})
    assert plan.teacher is not None
    assert plan.teacher.slowdown["none"] > 1
    assert not plan.warnings


@pytest.mark.parametrize("allowed", [("none",), ("none", "tensor")])
def test_what_is_planned_and_cannot_run_is_marked(
    allowed: tuple[str, ...], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALLOWED_NOW, "let_share_teacher", allowed)
    flags = {**MOCK, **PIPELINE, "--decoder-first-pipeline-num-layers": 3, "--let-teacher-load": teacher}
    plan = plan_of({**flags, "--let-student-layer": 1}, 2)
    (line,) = (line for line in plan_lines(plan) if "--let-share-teacher" in line)
    shares = line.partition("): ")[2].split(", ")
    assert [share.split()[0] for share in shares if not share.endswith("(planned only)")] == list(allowed)
    assert plan.warnings[0].endswith("planned only)") is ("tensor" not in allowed)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "fp32's own speed"),
        ({"--bf16": None}, None),
        ({"--bf16": None, "--let-teacher-dtype": "fp32"}, "the fp32 teacher's own speed"),
        ({"--distributed-backend": "gloo"}, None),
    ],
)
def test_fp32_at_the_peak_of_bf16_is_told(changes: dict[str, Any], told: str | None, teacher: Path) -> None:
    plan = plan_of({**MOCK, "--let-teacher-load": teacher, **changes})
    lines = [line.partition(":")[0] for line in plan.not_planned if "fp32" in line]
    assert lines == ([] if told is None else [told])


def test_time_follows_from_the_stated_speed(described_teacher: Path) -> None:
    plan = plan_of(
        {**MOCK, "--let-teacher-load": described_teacher, "--let-stop-iters": 2}, 4, mfu=0.5, gpu="H100"
    )
    assert plan.time is not None
    assert plan.teacher is not None
    assert plan.time.tflops_per_device == 0.5 * 989
    assert plan.time.seconds_per_iteration == pytest.approx(plan.work.flops_per_iteration / (4 * 494.5e12))
    guided = plan.time.seconds_per_iteration_with_teacher
    assert guided is not None
    assert guided == pytest.approx(plan.time.seconds_per_iteration * plan.teacher.slowdown["none"])
    assert plan.time.days * 86_400 == pytest.approx(3 * plan.time.seconds_per_iteration + 2 * guided)
    assert plan.work.tokens == 5 * 8 * 32
    assert plan_of(MOCK).time is not None


def test_on_cpu_the_work_is_told_without_a_time() -> None:
    plan = plan_of({**MOCK, "--distributed-backend": "gloo"})
    flops = 8 * 32 * training_flops_per_token(parse_arguments(arguments(TINY_STUDENT, MOCK)), 72)
    assert (plan.work.iterations, plan.work.tokens, plan.work.flops_per_iteration) == (5, 5 * 8 * 32, flops)
    assert plan.time is None
    lines = list(plan_lines(plan))
    assert any(line.startswith(f"work: 5 iterations, 1,280 tokens; {flops:.4g} FLOP") for line in lines)
    assert not any(line.startswith("time:") for line in lines)


@pytest.mark.parametrize(("share", "is_told"), [(1.1, True), (0.91, True), (0.89, False)])
def test_memory_that_a_gpu_does_not_have_is_told(share: float, is_told: bool) -> None:
    need = plan_of(MOCK).stages[0].memory.before_stop / GIB
    warnings = plan_of(MOCK, gpu_memory_gib=need / share).warnings
    assert [line.startswith("stage 0 needs 0.0 GiB of the 0.00") for line in warnings] == [True] * is_told


@pytest.mark.parametrize(("gpu", "is_told"), [("L40S", True), ("H100", True), ("H200", False)])
def test_the_memory_is_that_of_the_gpu(gpu: str, is_told: bool) -> None:
    wide = {
        "--hidden-size": 4096,
        "--ffn-hidden-size": 11008,
        "--num-attention-heads": 32,
        "--num-layers": 38,
    }
    plan = plan_of({**MOCK, **wide}, gpu=gpu)
    assert 0.9 * 80 < plan.stages[0].memory.before_stop / GIB < 0.9 * 141
    assert bool(plan.warnings) is is_told


def test_a_checkpoint_has_the_planned_size(pool: RankPool, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        **MOCK,
        "--hidden-size": 256,
        "--ffn-hidden-size": 688,
        "--bf16": None,
        "--train-iters": 1,
    }
    flags |= {**PIPELINE, "--save": tmp_path, "--untie-embeddings-and-output-weights": False}
    pool.run(2, train, arguments(TINY_STUDENT, flags))
    size = sum(path.stat().st_size for path in (tmp_path / "iter_0000001").iterdir())
    # names, shapes and random states stand beside the numbers
    assert plan_of(flags, 2).checkpoint_bytes == pytest.approx(size, rel=0.03)


def test_all_that_is_wrong_is_told_at_once(teacher: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        **MOCK,
        **TENSOR,
        "--num-layers": 5,
        **PIPELINE,
        "--ffn-hidden-size": 97,
        "--global-batch-size": 3,
    }
    flags |= {"--min-lr": 1, "--let-teacher-load": tmp_path / "nowhere"}
    found = problems_of(flags, 8, gpu="abacus")
    words = (
        "--ffn-hidden-size 97",
        "--num-layers 5",
        "--global-batch-size 3",
        "--min-lr",
        "abacus",
        "nowhere",
    )
    assert len(found) == len(words)
    for word, line in zip(words, found, strict=True):
        assert word in line
    (line,) = problems_of(MOCK, mfu=1.5)
    assert line.startswith("--mfu 1.5")
    (line,) = problems_of({**MOCK, "--vocab-size": 100, "--let-teacher-load": teacher})
    assert line.startswith("the student's token ids reach 100 but the teacher knows ids up to 66")
    (line,) = problems_of(
        {
            **MOCK,
            "--tokenizer-type": "HuggingFaceTokenizer",
            "--tokenizer-model": tmp_path,
            "--vocab-size": False,
        }
    )
    assert "--vocab-size" in line


def heading_of(line: str) -> list[str]:
    """Return the last headings of a table, which stand two blanks apart."""
    return re.split(" {2,}", line)[-4:]


def test_a_microbatch_is_told_with_the_teacher_and_without(teacher: Path) -> None:
    plan = plan_of({**MOCK, "--let-teacher-load": teacher})
    plan = replace(plan, stages=(replace(plan.stages[0], flops=1e12, teacher_flops=2e12),))
    assert any(line.endswith("  3.00   1.00") for line in plan_lines(plan))


@pytest.mark.usefixtures("own_process")
def test_the_tool_prints_a_row_a_stage_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(TINY_STUDENT, {**MOCK, **PIPELINE})
    assert plan_run.main([*words, "--world-size", "2", "--json", str(tmp_path / "plan.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = next(index for index, line in enumerate(lines) if "activations" in line)
    assert [line.split()[:3] for line in lines[heading + 1 : heading + 3]] == [
        ["0e", "0-0", "1-2"],
        ["1h", "1-1", "3-4"],
    ]
    assert any(line.startswith("not planned: ") for line in lines)
    assert heading_of(lines[heading]) == ["before S_stop", "after", "TFLOP before", "after"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    for stage in plan["stages"]:
        memory = stage["memory"]
        held = sum(memory[name] for name in ("weights", "gradients", "optimizer", "activations"))
        assert memory["before_stop"] == memory["after_stop"] == held
    assert sum(stage["whole_parameters"] for stage in plan["stages"]) == plan["parameters"]
    assert plan_run.main([*words, "--world-size", "3", "--min-lr", "1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line[:7] for line in errors if "warning" not in line] == ["error: "] * 2


@pytest.mark.usefixtures("own_process")
def test_the_entry_script_plans_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(TINY_STUDENT, {**MOCK, **PIPELINE, "--save": tmp_path / "run"})
    monkeypatch.setattr("sys.argv", ["pretrain_let.py", *words, "--dry-run", "--world-size", "2"])
    assert pretrain_let.main(RunReport()) == 0
    assert capsys.readouterr().out.startswith("2 ranks: tensor 1, context 1, pipeline 2")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "a GPU that is here has no part in a plan"
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "1")
    assert pretrain_let.main(RunReport()) == 0
    assert capsys.readouterr().out == ""
