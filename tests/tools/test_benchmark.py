"""The benchmark: its figures by hand, its floor by counting weights, and each subcommand once at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import benchmark
import benchmark_measure
import pytest
import torch
from benchmark_measure import Bench
from benchmark_reference import BareLoop, Gpt
from benchmark_report import Result, ratio_cells, ratios, read_json, refresh, step_ms
from benchmark_shapes import SHAPES, body_parameters, flop_floor, loop_settings
from benchmark_sides import Side, SideError, StepTime, open_side


def blocks(*seconds: float) -> list[list[StepTime]]:
    """Return blocks of two steps each; the processor took half of the time."""
    return [[StepTime(value, value / 2), StepTime(value, value / 2)] for value in seconds]


def test_a_ratio_is_the_median_of_pairs_measured_back_to_back() -> None:
    slow, fast = blocks(2.0, 6.0, 3.0), blocks(1.0, 2.0, 2.0)
    assert ratios(slow, fast) == [2.0, 3.0, 1.5]
    cells = ratio_cells("slow over fast", slow, fast, has_processor=True)
    assert cells == {"slow over fast": 2.0, "middle half": "1.750 to 2.500", "by processor time": 2.0}
    assert step_ms(slow) == 3000.0


@pytest.mark.parametrize("name", SHAPES)
def test_the_floor_counts_the_weights_that_multiply(name: str) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        student, teacher = Gpt(shape.student), Gpt(shape.teacher)
    sizes = {key: parameter.numel() for key, parameter in student.named_parameters()}
    body = sum(size for key, size in sizes.items() if key.startswith(("blocks", "norm")))
    assert body == body_parameters(shape.student)
    without = ("embedding", "head")
    teacher_body = sum(p.numel() for key, p in teacher.named_parameters() if not key.startswith(without))
    assert flop_floor(shape) == pytest.approx(teacher_body / (3 * (body + sizes["head.weight"])))


def test_the_bare_loop_learns() -> None:
    """It must be a fair reference: a loop that trains."""
    shape = SHAPES["tiny"].student
    settings = loop_settings(SHAPES["tiny"], world_size=1, is_fused=False, is_bf16=False)
    tokens = torch.arange(shape.seq_length + 1).repeat(settings.micro_batch_size * 40, 1)
    loop = BareLoop(
        shape, settings, weights=Gpt(shape).state_dict(), tokens=tokens, device=torch.device("cpu")
    )
    for _ in range(20):
        loop.step()
    first, last = loop.losses()
    assert last < first - 0.5


class _Answering:
    """A side that gives the same answers to every question."""

    def __init__(self, name: str, *answers: Any) -> None:
        self.name = name
        self._answers = list(answers)

    def ask(self, *_: Any) -> list[Any]:
        return self._answers


@pytest.mark.parametrize(("theirs", "is_equal"), [(4.0, True), (4.00001, True), (4.001, False)])
def test_a_side_that_computes_something_else_is_not_timed(theirs: float, is_equal: bool) -> None:
    bench = cast(Bench, type("Fp32", (), {"precision": "fp32"}))
    ours, bare = (cast(Side, _Answering(name, loss)) for name, loss in (("ours", 4.0), ("bare", theirs)))
    if is_equal:
        assert benchmark_measure._check_parity(bench, ours, bare) == pytest.approx(abs(theirs - 4) / theirs)
        return
    with pytest.raises(AssertionError, match="first loss differs from bare's"):
        benchmark_measure._check_parity(bench, ours, bare)


def test_losses_that_part_later_are_not_timed() -> None:
    bench = cast(Bench, type("Fp32", (), {"precision": "fp32"}))
    ours, bare = cast(Side, _Answering("ours", [4.0, 3.0])), cast(Side, _Answering("bare", [4.0, 3.1]))
    with pytest.raises(AssertionError, match="losses differ from bare's"):
        benchmark_measure._check_later_losses(bench, ours, bare)


def test_a_side_that_fails_shows_its_traceback() -> None:
    problem = r"rank 0 of broken failed\n(.|\n)*No module named 'nowhere'"
    with pytest.raises(SideError, match=problem), open_side("broken", "nowhere:run", None):
        pass


COMMANDS = {
    "train": (["train", "--ranks", "1"], {"our speed over its", "our tokens/s", "its tokens/s"}, 2),
    "let": (["let", "--teachers", "hf"], {"LET over plain", "FLOP floor"}, 1),
    "memory": (["memory", "--teachers", "megatron"], {"MB before S_stop", "MB after"}, 2),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_measurement_runs_and_leaves_its_figures(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, columns, num_rows = COMMANDS[command]
    path = tmp_path / "figures.json"
    small = ["--shape", "tiny", "--repeats", "1", "--steps", "1", "--json", str(path)]
    assert benchmark.main([*words, *small]) == 0
    result = read_json(path)
    assert result.benchmark == command
    assert len(result.rows) == num_rows
    for row in result.rows:
        assert columns <= row.keys()
        assert all(float(cast(float, row[column])) > 0 for column in columns)
    assert "| " + " | ".join(result.rows[0]) + " |" in capsys.readouterr().out


def test_the_document_shows_the_figures_of_its_files(tmp_path: Path) -> None:
    result = Result(
        "let", "python tools/benchmark.py let", "Two cores", [{"teacher": "hf", "ms": 1234.5}], ["A note."]
    )
    document, results = tmp_path / "benchmarks.md", tmp_path / "benchmarks"
    results.mkdir()
    (results / "let.json").write_text(json.dumps(vars(result)))
    document.write_text("# Before\n<!-- table of let.json -->\nold\n<!-- end of let.json -->\nafter\n")
    for _ in range(2):  # the second time it is there already
        assert benchmark.main(["report", "--document", str(document), "--results", str(results)]) == 0
        assert document.read_text() == (
            "# Before\n<!-- table of let.json -->\n```bash\npython tools/benchmark.py let\n```\n\nTwo cores.\n\n"
            "| teacher | ms |\n| --- | --- |\n| hf | 1,234.5 |\n\n* A note.\n<!-- end of let.json -->\nafter\n"
        )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- table of gone.json -->\n<!-- end of gone.json -->", "there is no such file"),
        ("<!-- table of let.json -->\n", "has no end mark"),
    ],
)
def test_a_document_that_asks_for_what_is_not_there(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        refresh(text, {"let.json": Result("let", "", "", [], [])})
