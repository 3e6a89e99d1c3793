"""Read the help text of dataclass fields: the string literal that follows each field."""

from __future__ import annotations

import ast
import inspect
import textwrap


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring literal after each annotated field of `cls` and its bases, blanks collapsed."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object:
            found.update(_literals_of_one_class(base))
    return found


def _literals_of_one_class(cls: type) -> dict[str, str]:
    """Return the field docstrings written in the body of `cls` itself."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    definition = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(definition, ast.ClassDef):
        return {}
    found = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
            continue
        if isinstance(following.value.value, str):
            found[statement.target.id] = " ".join(following.value.value.split())
    return found
