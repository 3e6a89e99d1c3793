"""The checks behind `test_architecture.py`: the package's shape, read from its source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "megatron_let"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# The part of the foundation that starts in a moment, before anything else is known to work.
WITHOUT_TORCH = frozenset(
    {
        "errors",
        "log",
        "optional",
        "lifetime",
        "limits",
        "signal_pipe",
        "slurm",
        "directory_lock",
        "exit_status",
        "entry",
        "plain_json",
        "regular_files",
    }
)
FOUNDATION = WITHOUT_TORCH | {"__init__", "launch"}
# What each room may import besides itself and the foundation. `let` and `mcore` never meet: `training` joins them.
ROOMS: Mapping[str, frozenset[str]] = {
    "config": frozenset(),
    "data": frozenset({"config"}),
    "let": frozenset({"config"}),
    "distill": frozenset({"config", "let"}),
    "conversion": frozenset({"config"}),
    "planning": frozenset({"config"}),
    "mcore": frozenset({"config", "data", "conversion"}),
    "training": frozenset({"config", "data", "let", "distill", "conversion", "planning", "mcore"}),
}
# Shipped for tests: may import everything, and nothing of the package imports it.
TEST_KIT = "testing"


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its path for messages, its text and its tree."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """Return the part below the package, or the first part of the name for what is outside it."""
        parts = self.name.split(".")
        if parts[0] != PACKAGE:
            return parts[0]
        return parts[1] if len(parts) > 1 else "__init__"


def parse(name: str, text: str, path: str = "") -> Module:
    """Build a module from its source."""
    return Module(name, path or name, text, ast.parse(text))


def read_modules(root: Path, *folders: str) -> list[Module]:
    """Read every source file below these folders (or these files) of the repository."""
    paths = [path for folder in folders for path in _sources(root / folder)]
    modules = []
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append(parse(name, path.read_text(), str(path.relative_to(root))))
    return modules


def _sources(place: Path) -> Iterator[Path]:
    """Yield the Python files at or below a place."""
    if place.is_file():
        yield place
    elif place.is_dir():
        yield from sorted(place.rglob("*.py"))


def imports_of(module: Module) -> list[tuple[str, int]]:
    """Return (dotted name, line) of all that a module imports, at its top or inside a function.

    `from a import b` counts as both a and a.b: b may be a module. Imports for type checkers alone count too: they
    are knowledge of the other room.
    """
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            found += [(base, node.lineno), *((f"{base}.{alias.name}", node.lineno) for alias in node.names)]
        elif isinstance(node, ast.Call) and _is_import_call(node):
            found += [(name, node.lineno) for name in _texts(node.args[:1])]
    return found


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """Return the dotted name that a `from` names, relative ones resolved."""
    if node.level == 0:
        return node.module or ""
    is_package = module.path.endswith("__init__.py")
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _is_import_call(node: ast.Call) -> bool:
    """Return whether this calls `import_module` or `__import__`."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__")


def _texts(nodes: Iterable[ast.expr]) -> list[str]:
    """Return the values of those expressions that are literal strings."""
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def upward_imports(modules: Iterable[Module]) -> list[str]:
    """Name each import that leads up, or sideways to where it must not."""
    problems = []
    for module in modules:
        if module.room == TEST_KIT:
            continue
        allowed = FOUNDATION | {module.room} | ROOMS.get(module.room, frozenset())
        if module.room not in FOUNDATION and module.room not in ROOMS:
            problems.append(f"{module.path}: the room {module.room!r} is not in tests/architecture.py")
            continue
        for name, line in imports_of(module):
            parts = name.split(".")
            if parts[0] in ("tools", "tests", "pretrain_let"):
                problems.append(f"{module.path}:{line} imports {name}, a program above the package")
            elif parts[0] == PACKAGE and len(parts) > 1 and parts[1] not in allowed and _is_room(parts[1]):
                problems.append(
                    f"{module.path}:{line} imports {name}: {module.room} may import {sorted(allowed)}"
                )
    return problems


def _is_room(name: str) -> bool:
    """Return whether the part after the package's name is a room and not a name such as `__version__`."""
    return not name.startswith("__")


def megatron_imports(modules: Iterable[Module]) -> list[str]:
    """Name each import of `megatron` outside `mcore/`."""
    return [
        f"{module.path}:{line} imports {name}; only {PACKAGE}/mcore may"
        for module in modules
        if module.room not in ("mcore", TEST_KIT)
        for name, line in imports_of(module)
        if name.split(".")[0] == "megatron"
    ]


def torch_imports(modules: Iterable[Module]) -> list[str]:
    """Name each import of torch in the part of the foundation that does without."""
    return [
        f"{module.path}:{line} imports {name}; the foundation does without torch"
        for module in modules
        if module.room in WITHOUT_TORCH
        for name, line in imports_of(module)
        if name.split(".")[0] == "torch"
    ]


def import_cycles(modules: Iterable[Module]) -> list[str]:
    """Name each circle of imports, from its alphabetically first module."""
    known = {module.name: module for module in modules}
    graph = {
        name: sorted({target for target, _ in imports_of(module) if target in known and target != name})
        for name, module in known.items()
    }
    circles: set[tuple[str, ...]] = set()
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circle = trail[trail.index(name) :]
            start = circle.index(min(circle))
            circles.add(circle[start:] + circle[:start])
        elif name not in done:
            for target in graph[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return [" -> ".join([*circle, circle[0]]) for circle in sorted(circles)]


def oversize(modules: Iterable[Module]) -> list[str]:
    """Name each file and each function that is too long to read in one go."""
    problems = []
    for module in modules:
        lines = len(module.text.splitlines())
        if lines > MAX_FILE_LINES:
            problems.append(f"{module.path} has {lines} lines, {MAX_FILE_LINES} are allowed")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    problems.append(f"{module.path}:{node.lineno} {node.name} has {length} lines")
    return problems


def missing_docstrings(modules: Iterable[Module]) -> list[str]:
    """Name each module, and each public class or function at its top, that does not say what it is."""
    problems = []
    for module in modules:
        if ast.get_docstring(module.tree) is None:
            problems.append(f"{module.path} has no docstring")
        for node in module.tree.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if not node.name.startswith("_") and ast.get_docstring(node) is None:
                problems.append(f"{module.path}:{node.lineno} {node.name} has no docstring")
    return problems


MUTABLE_LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = frozenset(
    {"list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "deque", "Counter"}
)


def mutable_state(modules: Iterable[Module]) -> list[str]:
    """Name each `global` statement and each module-level container that is not spelled as a constant."""
    problems = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                problems.append(f"{module.path}:{node.lineno} uses global")
        for node in module.tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not _is_mutable(node.value):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and not _is_constant(target.id):
                    problems.append(f"{module.path}:{node.lineno} {target.id} is module-level mutable state")
    return problems


def _is_mutable(value: ast.expr | None) -> bool:
    """Return whether an expression makes a list, dict, set or the like."""
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in MUTABLE_CALLS
    return isinstance(value, MUTABLE_LITERALS)


def _is_constant(name: str) -> bool:
    """Return whether a name is spelled as a constant (`__all__` counts as one)."""
    return name.upper() == name or name.startswith("__")
