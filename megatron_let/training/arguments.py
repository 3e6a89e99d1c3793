"""The command line of `pretrain_let.py`: words and a YAML file -> RunConfig."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_let import __version__
from megatron_let.config.command_line import (
    format_help,
    nearest,
    read_yaml,
    split_words,
    values_of_mapping,
    values_of_occurrences,
)
from megatron_let.config.run_config import RunConfig, all_settings
from megatron_let.errors import ConfigError
from megatron_let.mcore.settings import CORE_SECTIONS


def parse_arguments(argv: Sequence[str]) -> RunConfig:
    """Return the settings of a run; print and exit 0 for --help and --version; raise ConfigError."""
    settings = all_settings(CORE_SECTIONS)
    known = {flag for setting in settings for flag in setting.flags}
    ours = []
    values = {setting.dest: setting.default for setting in settings}
    for occurrence in split_words(argv):
        if occurrence.flag in ("-h", "--help"):
            print(format_help(settings, prog="pretrain_let.py", description="", epilog=""))
            raise SystemExit(0)
        if occurrence.flag == "--version":
            print(f"megatron_let {__version__}")
            raise SystemExit(0)
        if occurrence.flag == "--config":
            values.update(values_of_mapping(read_yaml(occurrence.words[0]), settings))
        elif occurrence.flag not in known:
            raise ConfigError(f"unknown flag {occurrence.flag}{nearest(occurrence.flag, known)}")
        else:
            ours.append(occurrence)
    values.update(values_of_occurrences(ours, settings))
    return RunConfig.from_values(values, CORE_SECTIONS)
