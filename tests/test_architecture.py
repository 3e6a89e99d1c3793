"""The house keeps its shape: imports point down, files and functions stay short, nothing public is without words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import (
    Module,
    import_cycles,
    imports_of,
    megatron_imports,
    missing_docstrings,
    mutable_state,
    oversize,
    parse,
    read_modules,
    torch_imports,
    upward_imports,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def package() -> list[Module]:
    """Return every module of the package."""
    modules = read_modules(ROOT, "megatron_let")
    assert len(modules) > 10, "the package was not found"
    return modules


@pytest.fixture(scope="module")
def programs() -> list[Module]:
    """Return the programs that stand above the package."""
    return read_modules(ROOT, "pretrain_let.py", "setup.py", "tools")


def test_imports_point_down_only(package: list[Module]) -> None:
    assert upward_imports(package) == []


def test_no_modules_import_each_other_in_a_circle(package: list[Module]) -> None:
    assert import_cycles(package) == []


def test_only_mcore_imports_megatron(package: list[Module], programs: list[Module]) -> None:
    assert megatron_imports([*package, *programs]) == []


def test_the_foundation_does_without_torch(package: list[Module]) -> None:
    assert torch_imports(package) == []


def test_the_entry_script_is_short() -> None:
    assert len((ROOT / "pretrain_let.py").read_text().splitlines()) < 40


def test_files_and_functions_can_be_read_in_one_go(package: list[Module], programs: list[Module]) -> None:
    tests = read_modules(ROOT, "tests")
    assert oversize([*package, *programs, *tests]) == []


def test_everything_public_says_what_it_is(package: list[Module], programs: list[Module]) -> None:
    assert missing_docstrings([*package, *programs]) == []


def test_no_state_lives_in_a_module(package: list[Module], programs: list[Module]) -> None:
    assert mutable_state([*package, *programs]) == []


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


# The checks themselves, on small sources: each must be able to fail.


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("megatron_let.config.model", "from megatron_let.training import build"),
        ("megatron_let.config.model", "import megatron_let.mcore.model"),
        ("megatron_let.let.losses", "from megatron_let.mcore.model import build_model"),
        ("megatron_let.mcore.tap", "from megatron_let.let.objective import AlignmentTarget"),
        ("megatron_let.mcore.tap", "def f():\n    from megatron_let.let import losses"),
        ("megatron_let.mcore.tap", "from megatron_let import let"),
        ("megatron_let.mcore.tap", "from ..let import losses"),
        ("megatron_let.mcore.tap", "import importlib\nimportlib.import_module('megatron_let.let')"),
        ("megatron_let.errors", "from megatron_let.config import flags"),
        ("megatron_let.training.build", "from megatron_let.testing import tiny"),
        ("megatron_let.training.build", "import tools.preprocess_data"),
        ("megatron_let.kitchen.sink", ""),
    ],
)
def test_an_upward_or_sideways_import_is_found(name: str, source: str) -> None:
    assert len(upward_imports([parse(name, source)])) >= 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("megatron_let.training.build", "from megatron_let.mcore.model import build_model"),
        ("megatron_let.training.build", "from megatron_let.let.losses import cosine_alignment"),
        ("megatron_let.let.losses", "from megatron_let.let.projection import interpolate_width"),
        ("megatron_let.data.indexed", "from megatron_let.errors import ConfigError"),
        ("megatron_let.mcore.model", "import megatron.core"),
        ("megatron_let.training.checkpoints", "from megatron_let import __version__"),
        ("megatron_let.testing.tiny", "from megatron_let.training import build"),
    ],
)
def test_a_downward_import_is_allowed(name: str, source: str) -> None:
    assert upward_imports([parse(name, source)]) == []


@pytest.mark.parametrize(
    "source",
    ["import megatron.core", "from megatron.core import mpu", "import megatron", "__import__('megatron')"],
)
def test_a_stray_megatron_import_is_found_and_our_own_name_is_not_one(source: str) -> None:
    assert len(megatron_imports([parse("megatron_let.data.batches", source)])) >= 1
    assert megatron_imports([parse("megatron_let.mcore.batches", source)]) == []
    assert megatron_imports([parse("megatron_let.data.batches", "import megatron_let.errors")]) == []


def test_torch_in_the_foundation_is_found() -> None:
    for source in ("import torch", "def f():\n    from torch import distributed"):
        assert len(torch_imports([parse("megatron_let.errors", source)])) >= 1
    assert torch_imports([parse("megatron_let.let.losses", "import torch")]) == []


def test_a_circle_is_found_even_through_a_package_and_inside_a_function() -> None:
    one = parse("megatron_let.a.one", "from megatron_let.b import two")
    two = parse("megatron_let.b.two", "def f():\n    import megatron_let.a.three")
    three = parse("megatron_let.a.three", "from .one import x")
    assert import_cycles([one, two, three]) == [
        "megatron_let.a.one -> megatron_let.b.two -> megatron_let.a.three -> megatron_let.a.one"
    ]
    assert import_cycles([one, two]) == []


def test_relative_imports_are_resolved_in_modules_and_in_packages() -> None:
    module = parse("megatron_let.a.one", "from .two import x\nfrom ..b import y")
    package = parse("megatron_let.a", "from .two import x", path="megatron_let/a/__init__.py")
    assert {name for name, _ in imports_of(module)} >= {"megatron_let.a.two", "megatron_let.b"}
    assert {name for name, _ in imports_of(package)} >= {"megatron_let.a.two"}


def test_long_files_and_functions_are_found() -> None:
    body = "\n".join("    pass" for _ in range(60))
    assert oversize([parse("m", f"def f():\n{body}")]) == ["m:1 f has 61 lines"]
    assert oversize([parse("m", f"class A:\n  def f(self):\n{body}")]) == ["m:2 f has 61 lines"]
    assert oversize([parse("m", "def f():\n" + body.rsplit("\n", 1)[0])]) == []
    assert oversize([parse("m", "x = 1\n" * 401)]) == ["m has 401 lines, 400 are allowed"]
    assert oversize([parse("m", "x = 1\n" * 400)]) == []


def test_missing_docstrings_are_found_on_public_things_only() -> None:
    assert missing_docstrings([parse("m", "")]) == ["m has no docstring"]
    source = (
        '"""M."""\ndef f():\n    pass\nclass A:\n    pass\ndef _g():\n    pass\ndef h():\n    """Do."""\n'
    )
    assert missing_docstrings([parse("m", source)]) == ["m:2 f has no docstring", "m:4 A has no docstring"]


@pytest.mark.parametrize(
    "source",
    [
        "cache = {}",
        "seen: set[int] = set()",
        "names = [n for n in 'ab']",
        "import collections\nqueue = collections.deque()",
        "def f():\n    global x\n    x = 1",
    ],
)
def test_module_state_is_found(source: str) -> None:
    assert len(mutable_state([parse("m", source)])) == 1


@pytest.mark.parametrize(
    "source", ["NAMES = ['a']", "__all__ = ['a']", "name = ('a',)", "def f():\n    x = []"]
)
def test_constants_and_locals_are_no_state(source: str) -> None:
    assert mutable_state([parse("m", source)]) == []
