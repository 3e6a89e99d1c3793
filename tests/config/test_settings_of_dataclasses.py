"""Settings are made of dataclass fields: spelling, type, default and help come from the field."""

from __future__ import annotations

import enum
import pickle
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any, Literal, Optional

import pytest
from megatron.core.transformer import TransformerConfig

from megatron_let.config.core_settings import Exposed, settings_class
from megatron_let.config.docstrings import field_docstrings
from megatron_let.config.megatron_flags import is_foreign
from megatron_let.config.run_config import all_settings
from megatron_let.config.setting import Setting, settings_of, value_type_of
from megatron_let.mcore.settings import CORE_SECTIONS, TransformerSettings


class Colour(enum.Enum):
    red = 1
    blue = 2


@dataclass
class Parent:
    inherited: int = 3
    """From the parent."""


@dataclass
class Sample(Parent):
    off_switch: bool = True
    """A switch that is on,
    described on two lines."""
    on_switch: bool = False
    either: bool | None = None
    number: float = 0.5
    words: tuple[str, ...] | None = None
    three: tuple[int, int, int] | None = None
    level: Literal[0, 1, 2] = 0
    colour: Colour = Colour.red
    # Written as megatron-core writes its fields.
    renamed: Optional[str] = field(default=None, metadata={"argparse_meta": {"arg_names": ["--new-name"]}})  # noqa: UP045
    needed: int = field(default=0, metadata={"argparse_meta": {"default": None}})
    kept_on: bool = field(default=True, metadata={"argparse_meta": {"arg_names": ["--drop-it"]}})


SampleSettings = settings_class(
    "SampleSettings",
    Sample,
    exposed=[
        Exposed("inherited", dest="megatron_name"),
        Exposed("renamed"),
        Exposed("needed"),
        Exposed("kept_on"),
        Exposed("number", default=2.0, help="Ours."),
    ],
    module=__name__,
    doc="Chosen fields.",
)


def by_dest(cls: type[Any]) -> dict[str, Setting]:
    return {setting.dest: setting for setting in settings_of(cls, "sample")}


def test_help_is_the_docstring_below_the_field_in_the_class_and_its_parents() -> None:
    found = field_docstrings(Sample)
    assert found["inherited"] == "From the parent."
    assert found["off_switch"] == "A switch that is on, described on two lines."
    assert "on_switch" not in found


def test_a_switch_has_the_spelling_that_changes_its_default_and_an_open_one_has_both() -> None:
    settings = by_dest(Sample)
    assert settings["off_switch"].flags == ("--no-off-switch",)
    assert settings["on_switch"].flags == ("--on-switch",)
    assert (settings["either"].on_flags, settings["either"].off_flags) == (("--either",), ("--no-either",))


@pytest.mark.parametrize(
    ("annotation", "base", "choices", "count", "may_be_none"),
    [
        (int, int, None, None, False),
        (float | None, float, None, None, True),
        (tuple[str, ...] | None, str, None, "+", True),
        (tuple[int, int, int], int, None, 3, False),
        (list[str], str, None, "+", False),
        (Literal[0, 1, 2], int, (0, 1, 2), None, False),
        (Colour, Colour, ("red", "blue"), None, False),
        (tuple[Literal["a", "b"], ...], str, ("a", "b"), "+", False),
    ],
)
def test_annotations_say_what_a_value_may_be(
    annotation: Any, base: type, choices: Any, count: Any, may_be_none: bool
) -> None:
    found = value_type_of(annotation)
    assert (found.base, found.choices, found.count, found.may_be_none) == (base, choices, count, may_be_none)


@pytest.mark.parametrize("annotation", [int | str, dict[str, int], object])
def test_an_annotation_no_word_can_spell_is_refused(annotation: Any) -> None:
    with pytest.raises(TypeError):
        value_type_of(annotation)


def test_a_class_from_chosen_core_fields_is_frozen_keeps_core_names_and_honours_its_flag_names() -> None:
    settings = by_dest(SampleSettings)
    assert settings["megatron_name"].flags == ("--megatron-name",)
    assert settings["megatron_name"].help == "From the parent."
    assert settings["renamed"].flags == ("--new-name",)
    assert settings["needed"].default is None
    assert settings["kept_on"].flags == ("--drop-it",)
    assert (settings["number"].default, settings["number"].help) == (2.0, "Ours.")
    values = SampleSettings(inherited=7)
    assert values.inherited == 7
    with pytest.raises(FrozenInstanceError):
        values.inherited = 8
    assert pickle.loads(pickle.dumps(values)) == values


def test_a_field_that_core_no_longer_has_is_noticed_when_the_class_is_made() -> None:
    with pytest.raises(KeyError):
        settings_class("Broken", Sample, exposed=[Exposed("gone")], module=__name__, doc="")


def test_every_setting_has_help_and_every_flag_and_name_belongs_to_one_setting() -> None:
    settings = all_settings(CORE_SECTIONS)
    assert not [setting.dest for setting in settings if setting.flags and not setting.help]
    flags = [flag for setting in settings for flag in setting.flags]
    assert len(flags) == len(set(flags))
    opposites = [flag for setting in settings for flag in setting.opposites]
    assert len(opposites) > 30
    assert len(flags + opposites) == len(set(flags + opposites))
    assert not [flag for flag in opposites if is_foreign(flag)], "Megatron-LM's flag of that name comes first"
    # A key of a config file is a dest or a flag's spelling: one text must not mean two settings.
    keys: dict[str, set[str]] = {}
    for setting in settings:
        for key in {setting.dest, *(flag[2:].replace("-", "_") for flag in setting.flags)}:
            keys.setdefault(key, set()).add(setting.dest)
    assert not {key: dests for key, dests in keys.items() if len(dests) > 1}


def test_exposed_transformer_fields_build_a_megatron_core_config() -> None:
    fields = {
        name: getattr(TransformerConfig, name, None) for name in TransformerSettings.__dataclass_fields__
    }
    assert fields.keys() <= TransformerConfig.__dataclass_fields__.keys()


def test_sections_that_share_a_name_agree_on_its_default() -> None:
    defaults: dict[str, set[Any]] = {}
    for section in CORE_SECTIONS:
        for setting in settings_of(section, ""):
            defaults.setdefault(setting.dest, set()).add(setting.default)
    assert not {dest: values for dest, values in defaults.items() if len(values) > 1}
