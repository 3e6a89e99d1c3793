"""Write docs/flags.md from the tables that the command line is made of.

    python tools/write_flags_doc.py

A test fails while the file is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.config.command_line import default_text, meaning, metavar_of
from megatron_let.config.megatron_flags import REFUSED, WITHOUT_EFFECT, FlagFamily
from megatron_let.config.run_config import all_settings
from megatron_let.config.setting import Setting
from megatron_let.mcore.settings import CORE_SECTIONS

ROOT = Path(__file__).resolve().parents[1]

INTRODUCTION = """\
# Flags of `pretrain_let.py`

Written by `python tools/write_flags_doc.py`; do not edit.

Names and defaults are Megatron-LM's (core 0.16) where it has the flag. `--config FILE.yaml` takes the same names,
with `-` or `_`, one `name: value` a line; the command line wins, and every switch has an opposite that undoes the
file's (`--no-bf16` for `--bf16`). `--dry-run` prints what the run will cost and runs nothing (`python tools/plan_run.py
--help` lists what goes with it). An unknown flag is an error. Every Megatron-LM flag
is in one of three places: among the settings, in "Accepted without effect" (named once in the log), or in "Refused"
(an error, because it would change the result or because a run relies on it).
"""


def flags_document() -> str:
    """Return the text of docs/flags.md."""
    lines = [INTRODUCTION]
    group = ""
    for setting in (setting for setting in all_settings(CORE_SECTIONS) if setting.flags):
        if setting.group != group:
            group = setting.group
            lines.append(f"\n## {group[0].upper()}{group[1:]}\n\n| flag | default | meaning |\n|---|---|---|")
        lines.append(setting_row(setting))
    lines.append("\n## Accepted without effect\n\n| subject | flags | why |\n|---|---|---|")
    lines.extend(family_rows(WITHOUT_EFFECT))
    lines.append("\n## Refused\n")
    lines.append("`=value` after a flag: that value is accepted, because it is what happens anyway.\n")
    lines.append("| subject | flags | why, or what to use |\n|---|---|---|")
    lines.extend(family_rows(REFUSED))
    return "\n".join(lines) + "\n"


def setting_row(setting: Setting) -> str:
    """Return the table row of a setting."""
    value = "" if setting.value_type.is_switch else f" {metavar_of(setting)}"
    flags = ", ".join(f"`{flag}{value}`" for flag in setting.flags)
    shows_default = not setting.value_type.is_switch and setting.default is not None
    default = f"`{default_text(setting)}`" if shows_default else ""
    return f"| {_cell(flags)} | {default} | {_cell(meaning(setting))} |"


def family_rows(families: tuple[FlagFamily, ...]) -> Iterator[str]:
    """Yield a table row for each family of Megatron-LM's flags."""
    for family in families:
        flags = ", ".join(
            f"`{flag}{f'={value}' if value else ''}`" for flag, value in family.entries().items()
        )
        yield f"| {family.subject} | {_cell(flags)} | {_cell(family.reason)} |"


def _cell(text: str) -> str:
    """Return `text` as a table cell can hold it."""
    return text.replace("|", "\\|")


def main() -> int:
    """Write the file."""
    path = ROOT / "docs" / "flags.md"
    path.write_text(flags_document(), encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
