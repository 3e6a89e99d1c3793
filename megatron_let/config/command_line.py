"""Words of a command line or a YAML file -> values by name, through the table of settings; and --help."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import yaml

from megatron_let.config.old_flags import advice_on
from megatron_let.config.setting import Setting
from megatron_let.config.values import value_from_words, value_from_yaml
from megatron_let.errors import ConfigError
from megatron_let.plain_json import is_name, shown
from megatron_let.regular_files import read_text

_NUMBER = re.compile(r"-(\d|\.\d)")
_LONGEST_NAME = 100
_NEAR = 0.75
"""Share of a misspelled name that must be that of a known one. At a half, half of the known flags resemble another."""


class Occurrence(NamedTuple):
    """A flag as it was typed, with the words that follow it."""

    flag: str
    words: tuple[str, ...]


def split_words(arguments: Sequence[str]) -> list[Occurrence]:
    """Return the flags of a command line in order, each with its words; `--flag=value` is understood.

    A word that starts with a dash and is no number begins a flag. Raises ConfigError for words before the
    first flag, and for bytes that are no UTF-8 text: settings are printed and saved as text.
    """
    found: list[Occurrence] = []
    for argument in arguments:
        if not argument.isascii():
            _require_text(argument, found[-1].flag if found else "")
        if argument.startswith("-") and not _NUMBER.match(argument):
            flag, equals, value = argument.partition("=")
            found.append(Occurrence(flag, (value,) if equals else ()))
        elif not found:
            raise ConfigError(f"{argument!r} belongs to no flag; settings are given as --flag value")
        else:
            last = found.pop()
            found.append(Occurrence(last.flag, (*last.words, argument)))
    return found


def _require_text(argument: str, flag: str) -> None:
    """Raise ConfigError for a word with undecodable bytes, which Python keeps as lone surrogates."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as problem:
        where = f"{flag} " if flag else ""
        raise ConfigError(f"{where}{argument!a} is not UTF-8 text; rename the path") from problem


def values_of_occurrences(
    occurrences: Iterable[Occurrence], settings: Sequence[Setting], problems: list[ConfigError]
) -> dict[str, Any]:
    """Return dest -> value for flags of the table; of a flag given twice the last counts. `problems` gets what is wrong."""
    by_flag = {flag: setting for setting in settings for flag in setting.spellings}
    found: dict[str, Any] = {}
    for flag, words in occurrences:
        try:
            found[by_flag[flag].dest] = value_from_words(by_flag[flag], flag, words)
        except ConfigError as problem:
            problems.append(problem)
    return found


def values_of_mapping(
    mapping: dict[str, Any], settings: Sequence[Setting], problems: list[ConfigError]
) -> dict[str, Any]:
    """Do the same for keys of a config file: a dest or a flag's spelling, with - or _."""
    by_key = {flag[2:].replace("-", "_"): setting for setting in settings for flag in setting.flags}
    by_key.update({setting.dest: setting for setting in settings if setting.flags})
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        try:
            setting = _setting_of_key(key, by_key, found)
            found[setting.dest] = value_from_yaml(setting, key, value)
        except ConfigError as problem:
            problems.append(problem)
    return found


def _setting_of_key(key: str, by_key: dict[str, Setting], found: dict[str, Any]) -> Setting:
    """Return the setting that a key of the file names, if it is known and new."""
    setting = by_key.get(key.replace("-", "_"))
    if setting is None:
        advice = advice_on(f"--{key.replace('_', '-')}") or nearest(key.replace("-", "_"), by_key)
        raise ConfigError(f"unknown name {shown(key)} in the config file{advice}")
    if setting.dest in found:
        raise ConfigError(f"{key} in the config file sets {setting.dest} a second time; leave one of them")
    return setting


def occurrence_of_yaml(key: str, value: Any) -> Occurrence:
    """Return a line of a config file as the flag with words that it stands for."""
    values = value if isinstance(value, list) else [value]
    words = () if value is True else tuple(str(item) for item in values)
    return Occurrence(f"--{key.replace('_', '-')}", words)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping in a config file; raise ConfigError when it cannot be read as one."""
    try:
        text = read_text(path)
    except OSError as problem:
        raise ConfigError(f"--config {path} cannot be read: {problem.strerror or problem}") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"--config {path} cannot be read: it is not UTF-8 text") from problem
    try:
        content = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as problem:
        what = shown(" ".join(str(problem).split()), 400)
        raise ConfigError(f"--config {path} is not YAML: {what}") from problem
    except _BAD_VALUES as problem:  # a tag or a number that PyYAML fails to make a value of
        what = shown(str(problem)) or type(problem).__name__
        raise ConfigError(f"--config {path} holds a value that cannot be read: {what}") from problem
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"--config {path} must hold lines of the form name: value")
    for key, value in content.items():
        for item in [key, *(value if isinstance(value, list) else [value])]:
            _require_plain(path, key, item)
    return content


_BAD_VALUES = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)
_LARGEST_BITS = 200


def _require_plain(path: str, key: str, item: Any) -> None:
    """Raise ConfigError for what YAML can spell and no setting can be: half characters, NUL, endless numbers."""
    if isinstance(item, int) and item.bit_length() > _LARGEST_BITS:
        raise ConfigError(f"--config {path}: {shown(key)} is {shown(item)}; give a smaller one")
    if isinstance(item, str) and not is_name(item):
        raise ConfigError(f"--config {path}: {shown(item)} is not text that a path or a name can have")


class _PlainLoader(yaml.SafeLoader):
    """YAML loader for lines `name: value` and `name: [values]`.

    It refuses a key given twice, where YAML would keep the last in silence, and what is nested deeper: a few lines
    whose aliases hold aliases would unfold to any size.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node: the whole, a value, or an item of a value."""
        event = self.peek_event()
        is_collection = isinstance(event, yaml.CollectionStartEvent) or (
            isinstance(event, yaml.AliasEvent)
            and isinstance(self.anchors.get(event.anchor), yaml.CollectionNode)
        )
        if is_collection and self._depth >= 2:
            raise yaml.composer.ComposerError(None, None, "a value is nested too deep", event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of `node`, each key once."""
        found: set[Any] = set()
        for key in (self.construct_object(key, deep=deep) for key, _ in node.value):
            if not isinstance(key, Hashable):
                continue  # refused by YAML itself
            if key in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key)} is given twice", node.start_mark
                )
            found.add(key)
        return super().construct_mapping(node, deep=deep)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name nearest to `name`, or nothing when none is near."""
    matches = difflib.get_close_matches(name[:_LONGEST_NAME], list(known), n=1, cutoff=_NEAR)
    return f"; did you mean {matches[0]}?" if matches else ""


def format_help(settings: Sequence[Setting], *, prog: str, description: str, epilog: str) -> str:
    """Return the text of --help: a group for each heading, defaults beside the flags."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--flag [value ...]] ...",
        description=description,
        epilog=epilog,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run will cost and run nothing; --world-size N: on N ranks (tools/plan_run.py --help)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="the same names in a file; the command line wins, and --no-X undoes the file's switch X",
    )
    groups: dict[str, Any] = {}
    for setting in (setting for setting in settings if setting.flags):
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        text = help_line(setting).replace("%", "%%")
        if setting.value_type.is_switch:
            groups[setting.group].add_argument(*setting.flags, action="store_true", help=text)
        else:
            metavar = metavar_of(setting)
            groups[setting.group].add_argument(*setting.flags, metavar=metavar, help=text)
    return parser.format_help()


def help_line(setting: Setting) -> str:
    """Return the help text of a setting with its default at the end."""
    if setting.value_type.is_switch or setting.default is None:
        return meaning(setting)
    return f"{meaning(setting)} (default: {default_text(setting)})"


def meaning(setting: Setting) -> str:
    """Return what a setting means, with its choices where they are too long to stand beside the flag."""
    if setting.value_type.is_switch or metavar_of(setting) != "NAME":
        return setting.help
    return f"{setting.help} One of {', '.join(str(choice) for choice in setting.value_type.choices or ())}."


def default_text(setting: Setting) -> str:
    """Return the default as it would be typed."""
    default = setting.default
    if isinstance(default, tuple | list):
        return " ".join(str(item) for item in default)
    return str(getattr(default, "name", default))


def metavar_of(setting: Setting) -> str:
    """Return what stands for the value in --help."""
    value_type = setting.value_type
    if value_type.choices is not None:
        one = "{" + ",".join(str(choice) for choice in value_type.choices) + "}"
        one = one if len(one) <= 80 else "NAME"
    else:
        one = {int: "N", float: "X", str: "TEXT"}[value_type.base]
    if value_type.count == "+":
        return f"{one} [{one} ...]" if len(one) < 8 else f"{one} ..."
    return one if value_type.count is None else " ".join([one] * int(value_type.count))
