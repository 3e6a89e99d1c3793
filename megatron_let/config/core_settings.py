"""Make a frozen settings class out of chosen fields of a dataclass that is not ours.

megatron-core's dataclasses hold hundreds of fields, many of them callables or results of other fields. The
classes made here hold only those that a user may set, with megatron-core's names, types, defaults and help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from megatron_let.config.docstrings import field_docstrings

AS_IN_CORE: Any = object()
"""Marks what an `Exposed` field takes over from the original dataclass."""


@dataclass(frozen=True)
class Exposed:
    """One field to expose, and in what it differs from the original dataclass."""

    name: str
    dest: str | None = None
    """Megatron-LM's name where it differs; the flag follows it unless `flags` is given."""
    flags: tuple[str, ...] | None = None
    """Spellings where neither name gives them; () for a value that is only derived."""
    off_flags: tuple[str, ...] | None = None
    default: Any = AS_IN_CORE
    annotation: Any = AS_IN_CORE
    help: str | None = None


def settings_class(
    name: str, source: type, *, exposed: Sequence[Exposed], module: str, doc: str
) -> type[Any]:
    """Return frozen dataclass `name` with the exposed fields of `source`.

    `module` is where the result is bound, so that it can be pickled. Raises KeyError for a field that
    `source` does not have (another megatron-core).
    """
    originals = {item.name: item for item in dataclasses.fields(source)}
    hints = get_type_hints(source)
    docstrings = field_docstrings(source)
    specifications = []
    for chosen in exposed:
        original = originals[chosen.name]
        annotation = hints[chosen.name] if chosen.annotation is AS_IN_CORE else chosen.annotation
        metadata = _metadata(chosen, original, docstrings.get(chosen.name, ""))
        new = dataclasses.field(default=_default(chosen, original), metadata=metadata)
        specifications.append((chosen.name, annotation, new))
    return dataclasses.make_dataclass(
        name, specifications, frozen=True, namespace={"__doc__": doc, "__module__": module}
    )


def _default(chosen: Exposed, original: dataclasses.Field[Any]) -> Any:
    """Return the default: ours, or that of megatron-core's command line, or the field's own."""
    if chosen.default is not AS_IN_CORE:
        return chosen.default
    return original.metadata.get("argparse_meta", {}).get("default", original.default)


def _metadata(chosen: Exposed, original: dataclasses.Field[Any], docstring: str) -> dict[str, Any]:
    """Return the field metadata that `config/setting.py` reads, core's own `arg_names` honoured."""
    metadata: dict[str, Any] = {"help": chosen.help or docstring}
    if chosen.dest is not None:
        metadata["dest"] = chosen.dest
    core_spellings = original.metadata.get("argparse_meta", {}).get("arg_names")
    turns_off = original.default is True
    if core_spellings:
        metadata["off_flags" if turns_off else "flags"] = tuple(core_spellings)
    if chosen.flags is not None:
        metadata["flags"] = chosen.flags
    if chosen.off_flags is not None:
        metadata["off_flags"] = chosen.off_flags
    return metadata
