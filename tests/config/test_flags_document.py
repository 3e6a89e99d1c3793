"""docs/flags.md says what the command line does."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_flags_document_is_up_to_date() -> None:
    written = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    current = runpy.run_path(str(ROOT / "tools" / "write_flags_doc.py"))["flags_document"]()
    assert written == current, "run python tools/write_flags_doc.py"
