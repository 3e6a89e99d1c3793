"""The rows of `tools/check_gpu.py`: what a part measured, against which bound, and how it came out."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_let.regular_files import read_text

PASSED, FAILED, MEASURED, NOT_RUN = "pass", "FAIL", "measured", "not run"


@dataclass(frozen=True)
class Setting:
    """What every part is told."""

    device: str
    """`cuda` or `cpu`."""

    size: str
    """`full` or `tiny`: shapes alone differ."""

    directory: str
    """Where parts keep their files; shared, so that one may use what another left."""

    @property
    def is_on_gpu(self) -> bool:
        """Return whether the parts run on a GPU."""
        return self.device == "cuda"


def fusion_flags(setting: Setting) -> tuple[str, ...]:
    """Return the flags that turn compiled kernels off where there is no C compiler, which Triton needs."""
    has_compiler = "CC" in os.environ or any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    is_without = setting.is_on_gpu and not has_compiler
    return ("--no-bias-dropout-fusion", "--no-bias-swiglu-fusion") if is_without else ()


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    measured: str | None
    bound: str | None
    result: str
    reason: str | None = None
    """Of a failure, or of what was not run."""

    values: dict[str, float] = field(default_factory=dict)
    """The numbers behind `measured`, for the JSON file."""


class Rows:
    """The rows of one part, on disk as soon as they are known: what comes later may crash."""

    def __init__(self, part: str, path: Path) -> None:
        self._part, self._path = part, path
        self._rows: list[Row] = []

    def measured(self, what: str, measured: str, **values: float) -> None:
        """Add what has no bound."""
        self._add(Row(self._part, what, measured, None, MEASURED, None, values))

    def held(self, what: str, measured: str, bound: str, *, holds: bool, **values: float) -> None:
        """Add what has a bound."""
        self._add(Row(self._part, what, measured, bound, PASSED if holds else FAILED, None, values))

    def not_run(self, what: str, reason: str) -> None:
        """Add what this machine cannot do."""
        self._add(Row(self._part, what, None, None, NOT_RUN, reason))

    def failed(self, what: str, reason: str) -> None:
        """Add what could not be measured."""
        self._add(Row(self._part, what, None, None, FAILED, reason))

    def guarded(self, what: str, action: Callable[[], None]) -> None:
        """Do `action`; an exception is a row."""
        import traceback

        try:
            action()
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().splitlines() or [""]
            self.failed(what, f"{type(error).__name__}: {first[0][:300]}")

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        self._path.write_text(json.dumps([asdict(row) for row in self._rows]), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Return the rows that a part has left; none when it did not come so far."""
    if not path.exists():
        return []
    try:
        return [Row(**row) for row in json.loads(read_text(path))]
    except ValueError:  # killed while it wrote
        return []


def last_words(log: Path) -> str:
    """Return the last line of a part's output."""
    lines = [line.strip() for line in read_text(log, errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, one line each; reasons stand below their row."""
    cells = [["part", "what", "measured", "bound", "result"]]
    cells += [[row.part, row.what, row.measured or "", row.bound or "", row.result] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    reasons = [None, *(row.reason for row in rows)]
    lines = []
    for line, reason in zip(cells, reasons, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if reason:
            lines += textwrap.wrap(reason, 110, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
