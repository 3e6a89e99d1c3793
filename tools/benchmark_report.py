"""Figures of `tools/benchmark.py`: from times to rows, to JSON, to tables in docs/benchmarks.md."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark_sides import StepTime

from megatron_let.regular_files import read_text

Cell = str | float | int | None
Blocks = Sequence[Sequence[StepTime]]

# In the document: a table stands between these, and `report` puts the one of that JSON file there.
_BEGIN, _END = "<!-- table of {name} -->", "<!-- end of {name} -->"
_ANY_BEGIN = re.compile(r"<!-- table of (\S+) -->")


@dataclass(frozen=True)
class Result:
    """One call of the benchmark."""

    benchmark: str
    command: str
    conditions: str
    """Device, threads, versions, repeats: what the figures depend on beside the code."""

    rows: list[dict[str, Cell]]
    notes: list[str]


def step_ms(blocks: Blocks) -> float:
    """Return the median wall time of a step in milliseconds."""
    return round(1e3 * statistics.median(step.wall for block in blocks for step in block), 2)


def ratios(numerator: Blocks, denominator: Blocks, *, by_processor: bool = False) -> list[float]:
    """Return numerator / denominator of the time of each pair of blocks; a pair was measured back to back."""
    field = StepTime._fields.index("processor" if by_processor else "wall")
    return [
        sum(step[field] for step in above) / sum(step[field] for step in below)
        for above, below in zip(numerator, denominator, strict=True)
    ]


def ratio_cells(name: str, numerator: Blocks, denominator: Blocks, *, has_processor: bool) -> dict[str, Cell]:
    """Return the cells of a ratio: its median, the middle half of the pairs, and the same by processor time."""
    values = ratios(numerator, denominator)
    cells: dict[str, Cell] = {
        name: round(statistics.median(values), 3),
        "middle half": _middle_half(values),
    }
    if has_processor:
        by_processor = ratios(numerator, denominator, by_processor=True)
        cells["by processor time"] = round(statistics.median(by_processor), 3)
    return cells


def _middle_half(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:.3f} to {high:.3f}"


def write_json(result: Result, path: Path) -> None:
    """Write a result for `read_json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Result:
    """Read what `write_json` wrote."""
    return Result(**json.loads(read_text(path)))


def markdown(result: Result) -> str:
    """Return a result as the document shows it: command, conditions, table, notes."""
    lines = ["```bash", result.command, "```", "", f"{result.conditions}.", ""]
    lines += _table(result.rows)
    if result.notes:
        lines += ["", *(f"* {note}" for note in result.notes)]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    headers = list(dict.fromkeys(header for row in rows for header in row))
    table = [headers, ["---"] * len(headers)]
    table += [[_shown(row.get(header)) for header in headers] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in table]


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:,}" if isinstance(cell, (int, float)) else cell


def refresh(document: str, results: Mapping[str, Result]) -> str:
    """Return `document` with each table that it asks for made anew from `results`, by file name.

    Raises:
        ValueError: a table's result is missing, or its end mark is.
    """
    for name in _ANY_BEGIN.findall(document):
        if name not in results:
            raise ValueError(f"the document has a table of {name}, and there is no such file")
        begin, end = _BEGIN.format(name=name), _END.format(name=name)
        before, _, rest = document.partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"the table of {name} has no end mark {end}")
        document = f"{before}{begin}\n{markdown(results[name])}\n{end}{after}"
    return document
