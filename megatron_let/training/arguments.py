"""The command line of `pretrain_let.py`: words and a YAML file -> RunConfig.

Megatron-LM's flag names. What the words mean comes from the settings' dataclasses (ours and megatron-core's), what
Megatron-LM's other flags are from `config/megatron_flags.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_let import __version__
from megatron_let.config.command_line import (
    Occurrence,
    format_help,
    nearest,
    occurrence_of_yaml,
    read_yaml,
    split_words,
    values_of_mapping,
    values_of_occurrences,
)
from megatron_let.config.data_files import with_data_files
from megatron_let.config.derive import derive, resolve
from megatron_let.config.megatron_flags import REFUSED, WITHOUT_EFFECT, family_of, is_foreign
from megatron_let.config.old_flags import advice_on
from megatron_let.config.run_config import RunConfig, all_settings
from megatron_let.config.setting import Setting
from megatron_let.config.validate import problems
from megatron_let.errors import ConfigError, raise_all
from megatron_let.log import LOGGER
from megatron_let.mcore.settings import CORE_SECTIONS
from megatron_let.plain_json import shown

PROGRAM = "pretrain_let.py"
ALTERNATIVES = tuple(
    frozenset(names.split())
    for names in (
        "train_iters train_samples",
        "lr_decay_iters lr_decay_samples",
        "lr_wsd_decay_iters lr_wsd_decay_samples",
        "lr_warmup_iters lr_warmup_samples lr_warmup_fraction",
        "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank",
        "let_stop_iters let_stop_fraction",
        "data_path data_args_path",
        "train_data_path per_split_data_args_path",
        "valid_data_path per_split_data_args_path",
        "test_data_path per_split_data_args_path",
    )
)
"""Ways to say the same thing: one on the command line replaces another in the file."""
_OWN_FLAGS = ("-h", "--help", "--version", "--config")


def parse_arguments(argv: Sequence[str]) -> RunConfig:
    """Return the settings that a command line (without the program's name) and its --config file give.

    What follows from them is filled in; `config.derive.resolve` then checks them for a number of ranks. Prints and
    exits 0 for --help and --version. Raises ConfigError: flags or names that are unknown or refused, values of the
    wrong type, all of them at once; a file that cannot be read.
    """
    config, found = _read(argv)
    raise_all(found)
    return config


def _read(argv: Sequence[str]) -> tuple[RunConfig, list[ConfigError]]:
    """Return the settings, those that were given wrongly left at their defaults, and all that is wrong with what was given."""
    found: list[ConfigError] = []
    settings = all_settings(CORE_SECTIONS)
    occurrences = split_words(argv)
    _answer_questions(occurrences, settings)
    from_file = _file_content(occurrences)
    foreign = [item for item in occurrences if is_foreign(item.flag)]
    foreign += [
        occurrence_of_yaml(key, value) for key, value in from_file.items() if _is_foreign_line(key, value)
    ]
    _judge_foreign(foreign, found)
    values = {setting.dest: setting.default for setting in settings}
    own_lines = {key: value for key, value in from_file.items() if not is_foreign(_flag(key))}
    typed = _values_of_flags([item for item in occurrences if not is_foreign(item.flag)], settings, found)
    replaced = {name for group in ALTERNATIVES if typed.keys() & group for name in group}
    in_file = values_of_mapping(own_lines, settings, found)
    values.update({name: value for name, value in in_file.items() if name not in replaced})
    values.update(typed)
    try:
        values = with_data_files(values)
    except ConfigError as problem:
        found.append(problem)
    return derive(RunConfig.from_values(values, CORE_SECTIONS), warn=LOGGER.warning), found


def settings_of_run(argv: Sequence[str]) -> RunConfig:
    """Return the settings of a run on as many ranks as the launcher has started, checked.

    Raises:
        ConfigError: as parse_arguments, or such a run cannot start; all that is wrong at once.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config, found = _read(argv)
    raise_all([*found, *problems(config, world_size)])
    return resolve(config, world_size)


def save_directory_of(argv: Sequence[str]) -> str | None:
    """Return the `--save` directory of a command line that may be wrong elsewhere, as far as it can be made out.

    A run that ends over its command line leaves its exit status there. None when only --help or --version is asked.
    """
    try:
        occurrences = split_words(argv)
        if {flag for flag, _ in occurrences} & {"-h", "--help", "--version"}:
            return None
        given = [words for flag, words in occurrences if flag == "--save"]
        words = given[-1] if given else (_file_content(occurrences).get("save"),)
    except ConfigError:
        return None
    return words[0] if len(words) == 1 and isinstance(words[0], str) and words[0].strip() else None


def _answer_questions(occurrences: Iterable[Occurrence], settings: Sequence[Setting]) -> None:
    """Print what --help or --version asks for and exit."""
    flags = {occurrence.flag for occurrence in occurrences}
    if flags & {"-h", "--help"}:
        _say(
            format_help(
                settings,
                prog=PROGRAM,
                description="Pretrain a GPT with Megatron-Core. --let-teacher-load PATH adds a small frozen teacher that "
                "guides an early layer for the first iterations.",
                epilog="docs/flags.md has the same list, with Megatron-LM's flags that have no effect or are refused.",
            )
        )
        raise SystemExit(0)
    if "--version" in flags:
        _say(f"megatron_let {__version__}")
        raise SystemExit(0)


def _file_content(occurrences: Iterable[Occurrence]) -> dict[str, Any]:
    """Return the lines of the --config file, none without one."""
    given = [occurrence.words for occurrence in occurrences if occurrence.flag == "--config"]
    if not given:
        return {}
    if len(given) > 1 or len(given[0]) != 1:
        raise ConfigError("--config takes one file and is given once")
    return read_yaml(given[0][0])


def _values_of_flags(
    occurrences: Iterable[Occurrence], settings: Sequence[Setting], problems: list[ConfigError]
) -> dict[str, Any]:
    """Return dest -> value for the flags typed; `problems` gets what is wrong with them."""
    known = {flag for setting in settings for flag in setting.spellings}
    ours = [occurrence for occurrence in occurrences if occurrence.flag not in _OWN_FLAGS]
    for flag in dict.fromkeys(occurrence.flag for occurrence in ours):
        if flag not in known:
            advice = advice_on(flag) or nearest(flag, known | set(_OWN_FLAGS))
            problems.append(ConfigError(f"unknown flag {flag}{advice}"))
    return values_of_occurrences([item for item in ours if item.flag in known], settings, problems)


def _judge_foreign(foreign: Iterable[Occurrence], problems: list[ConfigError]) -> None:
    """Warn once about each of Megatron-LM's flags that have no effect here; `problems` gets each that is refused.

    A refused flag passes when its value is what happens here anyway.
    """
    warnings: dict[str, str] = {}
    refusals: dict[str, str] = {}
    for flag, words in foreign:
        refused, ignored = family_of(flag, REFUSED), family_of(flag, WITHOUT_EFFECT)
        if refused is not None:
            harmless = refused.entries()[flag]
            if not harmless or words != (harmless,):
                refusals[flag] = f"{flag} is not supported: {refused.reason}"
        elif ignored is not None:
            if words and ignored.entries()[flag] is None:
                refusals[flag] = f"{flag} is a switch and takes no value, got {shown(' '.join(words))}"
            warnings[flag] = f"{flag} has no effect: {ignored.reason}"
    problems += map(ConfigError, refusals.values())
    for warning in warnings.values():
        LOGGER.warning(warning)


def _flag(key: str) -> str:
    """Return the flag that a key of a config file spells."""
    return f"--{key.replace('_', '-')}"


def _is_foreign_line(key: str, value: Any) -> bool:
    """Return whether a line of a config file turns on a flag that is no setting here."""
    return is_foreign(_flag(key)) and value is not False and value is not None


def _say(text: str) -> None:
    """Print on the first rank by torchrun's environment; process groups do not exist yet."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
