"""What `pip install -e .` asks for is there in NVIDIA's containers, so that it leaves their packages alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SETUP = Path(__file__).parents[1] / "setup.py"


def requirements() -> dict[str, Requirement]:
    """Return name -> requirement of the main install and of the extra for GPUs."""
    words = [node.value for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.Constant)]
    found: dict[str, Requirement] = {}
    for word in words:
        for name in ("torch", "megatron-core", "transformer-engine"):
            if isinstance(word, str) and word.startswith(name) and any(mark in word for mark in "=<>"):
                found[name] = Requirement(word)
    return found


@pytest.mark.parametrize(
    ("name", "version", "is_enough"),
    [
        ("torch", "2.13.0", True),
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.13.0a0+nv", True),
        ("torch", "2.13.0a0+8145d630e8.nv26.06", True),
        ("torch", "2.14.0a0+0ba8b0b.nv26.09.48", True),
        ("torch", "2.12.1", False),
        ("torch", "2.12.0a0+nv", False),
        ("megatron-core", "0.16.1", True),
        ("megatron-core", "0.16.1+3fa2c1d", True),
        ("megatron-core", "0.17.0", False),
        ("transformer-engine", "2.11.0+c188b533", True),
        ("transformer-engine", "2.12.0", False),
    ],
)
def test_a_containers_versions_are_enough(name: str, version: str, is_enough: bool) -> None:
    # As pip asks of what is installed: a release before the final one counts only where the requirement names one.
    assert requirements()[name].specifier.contains(version) is is_enough
