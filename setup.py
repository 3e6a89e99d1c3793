"""Package metadata. Why each requirement is there: docs/decisions/0001-dependencies.md; exact pins: requirements/."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Return `__version__` from the package's source, without importing it."""
    for node in ast.parse((ROOT / "megatron_let" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError("megatron_let/__init__.py holds no __version__")


setup(
    name="megatron_let",
    version=read_version(),
    description="Pretrain a large GPT on Megatron-Core while a small frozen teacher guides an early layer (LET)",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_let", "megatron_let.*"]),
    install_requires=[
        "torch>=2.13.0a0",  # a container calls its build between two releases 2.13.0a0+...nv...
        "megatron-core==0.16.1",
        "psutil",
        "numpy",
        "orjson",
        "pyyaml",
        "tokenizers",
        "sentencepiece",
        "transformers>=5",
        "safetensors",
    ],
    extras_require={
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        "logging": ["tensorboard", "wandb"],
        "quickstart": ["matplotlib"],
        "data": ["gigatoken", "pyarrow", "zstandard"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "megatron_let[data,quickstart]",
            "tensorboard",
        ],
        "fuzz": ["atheris>=3", "megatron_let[test]"],
    },
)
