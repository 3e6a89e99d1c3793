"""The check for a GPU without one: every part at a tiny size on the CPU, and how rows come out that should fail."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import check_gpu
import check_gpu_parity
import check_gpu_parts
import check_gpu_resume
import pytest
import torch
from check_gpu_parity import _stock_name, gradient_errors, loss_error
from check_gpu_rows import FAILED, MEASURED, NOT_RUN, PASSED, Row, Rows, Setting, read_rows, table

from megatron_let.config.derive import resolve
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import model_tensors
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.plan import ANYWHERE
from tests.processes import HANG_SECONDS

ROOT = Path(__file__).parents[2]


def run_here(part: str, setting: Setting, changes_of_second: list[str]) -> list[Row]:
    """Run one part in this rank; what it would start as programs of its own runs here too.

    `changes_of_second` are flags of the second run of a part.
    """
    from check_gpu_parts import PARTS

    from megatron_let.testing.training import train

    runs: list[Path] = []

    def train_here(setting: Setting, directory: Path, changes: dict[str, Any] | None = None) -> float:
        flags = check_gpu_resume.run_flags(setting, directory, changes)
        flags += changes_of_second if runs else []
        runs.append(directory)
        assert train(flags) == 0
        return 0.0

    rows = Path(setting.directory, f"{part}.json")
    with (
        patch.object(check_gpu_parity, "_run_side", check_gpu_parity.run_side),
        patch.object(check_gpu_resume, "_train", train_here),
    ):
        rows_of_part = Rows(part, rows)
        rows_of_part.guarded("the part", lambda: PARTS[part](setting, rows_of_part))
    return read_rows(rows)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Return the setting of a tiny run on the CPU."""
    return Setting("cpu", "tiny", str(tmp_path))


@pytest.fixture
def rows_of(pool: RankPool, setting: Setting) -> Callable[..., list[Row]]:
    """Return what runs one part on a rank."""

    def run(part: str, changes: list[str] | None = None) -> list[Row]:
        rows = pool.run(1, run_here, part, setting, changes or [])[0]
        assert [row.reason for row in rows if row.what == "the part"] == []
        return rows

    return run


def test_parity_holds_and_names_what_is_missing(rows_of: Callable[..., list[Row]], setting: Setting) -> None:
    *held, missing = rows_of("parity")
    assert [row.result for row in held] == [PASSED] * 4
    assert (missing.result, missing.reason) == (NOT_RUN, "there is no GPU")
    fp32, bf16 = held[1].values, held[3].values
    # the same device on both sides: not a bit differs in fp32, while bf16 shows its roundings
    assert fp32["worst"] == 0.0
    assert 1e-4 < bf16["overall"] == bf16["cpu_overall"] < 0.1
    weights = model_tensors(Path(setting.directory, "start", "iter_0000000"))
    assert [name for name, weight in weights.items() if not weight.equal(weight.bfloat16().float())] == []


@pytest.mark.parametrize("precision", check_gpu_parity.PRECISIONS)
def test_the_program_takes_the_flags_of_every_precision_with_transformer_engine(
    precision: str, tmp_path: Path
) -> None:
    flags = {
        "--train-iters": 1,
        "--transformer-impl": "transformer_engine",
        **check_gpu_parity.PRECISIONS[precision],
    }
    setting = Setting("cuda", "full", str(tmp_path))
    check_gpu_parity.write_inputs(setting)
    config = resolve(parse_arguments(check_gpu_parity.student_flags(setting, **flags)), 1, ANYWHERE)
    assert (config.transformer.fp8 is not None) == (precision == "fp8")


def test_names_of_transformer_engines_norms_are_those_of_the_stock_layers() -> None:
    before = "decoder.layers.0."
    assert (
        _stock_name(f"{before}self_attention.linear_qkv.layer_norm_weight")
        == f"{before}input_layernorm.weight"
    )
    assert _stock_name(f"{before}mlp.linear_fc1.layer_norm_weight") == f"{before}pre_mlp_layernorm.weight"
    assert _stock_name(f"{before}mlp.linear_fc1.weight") == f"{before}mlp.linear_fc1.weight"


def test_wrong_gradients_and_losses_are_failures(setting: Setting) -> None:
    directory = Path(setting.directory)
    gradients = {"a.weight": torch.ones(4), "b.weight": torch.full((4,), 1e-3)}
    for side, precision, error in (
        ("CPU stock", "fp32", 0.0),
        ("CPU stock", "bf16", 1e-2),
        ("GPU", "fp32", 1e-3),
        ("GPU", "bf16", 3e-2),
        ("GPU", "fp8", 0.5),
    ):
        noisy = {**gradients, "b.weight": gradients["b.weight"] * (1 + error)}
        if precision == "fp8":
            noisy = {name: gradient * (1 + error) for name, gradient in gradients.items()}
        result = {"lm": 4.0 * (1 + error), "let": -0.1, "gradients": noisy}
        torch.save(result, directory / f"side {side} {precision}.pt")
    rows = Rows("parity", directory / "rows.json")
    check_gpu_parity._compare(setting, check_gpu_parity.Side("GPU", "local", ("fp32", "bf16", "fp8")), rows)
    found = read_rows(directory / "rows.json")
    assert [row.result for row in found] == [FAILED] * 6
    assert "b.weight" in str(found[1].measured), "the small tensor is named: its error counts by its own size"


def test_errors_are_relative_and_nan_is_infinite() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    assert gradient_errors({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0])}, expected) == (
        0.1,
        "a",
        0.1,
    )
    worst, name, overall = gradient_errors({"a": expected["a"], "b": torch.tensor([math.nan])}, expected)
    assert (worst, name) == (math.inf, "b")
    assert math.isnan(overall)
    assert loss_error(math.nan, 4.0) == math.inf
    assert loss_error(4.4, 4.0) == pytest.approx(0.1)
    assert loss_error(-0.02, -0.01) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="other weights"):
        gradient_errors({"a": expected["a"]}, expected)


def test_steps_say_speed_work_memory_and_loss(rows_of: Callable[..., list[Row]]) -> None:
    speed, work, memory, plan, loss = rows_of("steps-bf16")
    assert [row.result for row in (speed, work, memory, plan, loss)] == [MEASURED] * 4 + [PASSED]
    assert all("stock layers" in row.what for row in (speed, work, memory, loss))
    per_token = 1e12 * work.values["tflops"] / speed.values["tokens_per_second"]
    # 2 layers of 32 (4 heads, 2 groups of 8; MLP 64; 16 positions) and a head of 128 ids, by hand
    assert per_token == pytest.approx(6 * (2 * (32 * (2 * 32 + 2 * 16) + 32 * 16 + 3 * 32 * 64) + 32 * 128))
    assert memory.values["bytes"] > 1e6
    # bf16 weights, fp32 gradients, main weights and moments of a tied embedding and two layers, by hand
    parameters = 128 * 32 * 2 + 2 * (32 * (2 * 32 + 2 * 16) + 3 * 32 * 64 + 2 * 32) + 32
    assert 1 < plan.values["planned"] / (18 * parameters) < 1.5
    (fp8,) = rows_of("steps-fp8")
    assert (fp8.result, fp8.reason) == (NOT_RUN, "there is no GPU")


def test_release_leaves_no_tensor_of_the_teacher(rows_of: Callable[..., list[Row]]) -> None:
    row, before, after = rows_of("release")
    assert (row.result, row.measured) == (PASSED, "0 of 11")
    assert before.values["planned"] > after.values["planned"] > 0


@pytest.mark.parametrize(("peak", "result"), [(100, PASSED), (90, FAILED), (112, FAILED), (111, PASSED)])
def test_a_plan_is_held_to_a_tenth_of_the_peak(peak: int, result: str, tmp_path: Path) -> None:
    rows = Rows("steps", tmp_path / "rows.json")
    check_gpu_parts._hold_plan(Setting("cuda", "full", str(tmp_path)), rows, "step", 100, peak)
    assert [row.result for row in read_rows(tmp_path / "rows.json")] == [result]


def test_a_teacher_that_stays_is_a_failure(setting: Setting, pool: RankPool) -> None:
    assert pool.run(1, keep_the_teacher, setting)[0].result == FAILED


def keep_the_teacher(setting: Setting) -> Row:
    """Run the part with somebody else holding on to the teacher."""
    from megatron_let.training.alignment import Alignment

    kept: list[Any] = []
    plain = Alignment.release

    def release(alignment: Alignment) -> None:
        kept.append(alignment.teacher)
        plain(alignment)

    with patch.object(Alignment, "release", release):
        return run_here("release", setting, [])[0]


def test_a_resume_is_bitwise(rows_of: Callable[..., list[Row]]) -> None:
    tensors, numbers, _ = rows_of("resume")
    assert (tensors.result, numbers.result) == (PASSED, PASSED)
    assert str(tensors.measured).startswith("0 of ")


def test_a_resume_with_other_dropout_is_a_failure(rows_of: Callable[..., list[Row]]) -> None:
    tensors, numbers, _ = rows_of("resume", ["--no-load-rng"])
    assert (tensors.result, numbers.result) == (FAILED, FAILED)


def test_the_overhead_stands_beside_its_floor(setting: Setting, pool: RankPool) -> None:
    """Its sides are programs of their own: seconds of start-up each."""
    (row,) = pool.run(1, run_here, "let", setting, [])[0]
    assert row.result == MEASURED
    assert row.values["floor"] > 0
    assert "floor" in str(row.measured)


PART = """
import json, os, signal, sys, time
from pathlib import Path
part, setting = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
row = {"part": part, "what": "w", "measured": "1", "bound": None, "result": "measured", "reason": None, "values": {}}
if part != "silent":
    Path(setting["directory"], part + ".json").write_text(json.dumps([row]))
if part == "crash":
    print("the last word", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if part == "fail":
    sys.exit(3)
if part == "hang":
    child = os.fork()
    Path(setting["directory"], "child" if child == 0 else "parent").write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("part", "measured", "reason"),
    [
        ("crash", "ended by SIGSEGV", "the last word"),
        ("fail", "exit code 3", "it said nothing"),
        ("hang", "over 3 s", "it said nothing"),
        ("silent", None, "it measured nothing"),
    ],
)
def test_a_part_that_ends_badly_is_a_row_beside_those_it_left(
    part: str, measured: str | None, reason: str, setting: Setting
) -> None:
    program = Path(setting.directory, "part.py")
    program.write_text(textwrap.dedent(PART))
    rows, _ = check_gpu.run_part(part, setting, limit=3.0 if part == "hang" else 30.0, program=program)
    assert [row.what for row in rows[:-1]] == ([] if part == "silent" else ["w"])
    assert (rows[-1].result, rows[-1].measured, rows[-1].reason) == (FAILED, measured, reason)
    if part == "hang":
        assert not is_alive(int(Path(setting.directory, "child").read_text())), "its children go with it"


def is_alive(pid: int) -> bool:
    """Return whether a process is there and no zombie; it is given a moment to go."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return True


@pytest.mark.parametrize(("result", "code"), [(PASSED, 0), (NOT_RUN, 0), (MEASURED, 0), (FAILED, 1)])
def test_only_a_failed_row_makes_the_exit_code_1(
    result: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("let", "what", "1.0", "2.0", result, "why")
    arguments = ["--device", "cpu", "--parts", "let", "environment", "--json", str(tmp_path / "a" / "b.json")]
    with patch.object(check_gpu, "run_part", lambda *_, **__: ([row], 1.5)):
        assert check_gpu.main(arguments) == code
    assert table([row, row]) in capsys.readouterr().out
    report = json.loads((tmp_path / "a" / "b.json").read_text())
    assert [found["result"] for found in report["rows"]] == [result] * 2
    assert report["seconds"] == {"let": 1.5, "environment": 1.5}


def test_a_part_without_time_left_fails(setting: Setting) -> None:
    rows, _ = check_gpu.run_part("let", setting, limit=-1.0)
    assert [(row.result, row.reason) for row in rows] == [(FAILED, "no time was left for it")]


def script(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "check_gpu.sh"), *words],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_without_a_gpu_the_script_says_so_and_ends_with_2() -> None:
    ended = script()
    assert ended.returncode == 2
    assert ended.stdout.startswith("no GPU is visible")
    assert len(ended.stdout.splitlines()) == 1


def test_the_script_runs_a_part_and_writes_the_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    ended = script("--device", "cpu", "--size", "tiny", "--parts", "environment", "--json", str(path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {row["what"]: row["measured"] for row in json.loads(path.read_text())["rows"]}
    assert torch.__version__ in rows["versions"]
    assert rows["layers that runs take by themselves"] == "stock"
