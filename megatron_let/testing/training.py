"""Run `pretrain_let.py`'s own assembly line inside a test rank, and read what came of it layout-free.

result = train(["--num-layers", "4", ...])      # inside RankPool.run, or alone in one process
weights = stored_tensors(save_directory / "iter_0000005")
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_let.config.derive import resolve
from megatron_let.data.indexed_writer import write_pair
from megatron_let.errors import ConfigError
from megatron_let.mcore.checkpoint import read_tensors, stored_entries
from megatron_let.mcore.parallel import parallel_context
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.metrics import METRICS_FILE
from megatron_let.training.signals import StopRequest
from megatron_let.training.watchdog import Watch

# Columns that hold times.
TIMES = frozenset(
    {
        "iteration_ms",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "tflops_per_device",
        "mfu",
        "elapsed_seconds",
    }
)

TINY_STUDENT: Mapping[str, str | None] = {
    "--num-layers": "4",
    "--hidden-size": "48",
    "--num-attention-heads": "4",
    "--group-query-attention": None,
    "--num-query-groups": "2",
    "--ffn-hidden-size": "96",
    "--seq-length": "32",
    "--position-embedding-type": "rope",
    "--swiglu": None,
    "--normalization": "RMSNorm",
    "--disable-bias-linear": None,
    "--untie-embeddings-and-output-weights": None,
    "--hidden-dropout": "0",
    "--attention-dropout": "0",
    "--make-vocab-size-divisible-by": "24",
    "--micro-batch-size": "1",
    "--global-batch-size": "8",
    "--train-iters": "5",
    "--lr": "3e-3",
    "--lr-decay-style": "cosine",
    "--weight-decay": "0.1",
    "--clip-grad": "1.0",
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": "60",
    "--num-workers": "0",
    "--log-interval": "1",
    "--eval-iters": "0",
}
"""A LLaMA-style student of 0.1M parameters that every test layout divides; a None value is a switch."""


def arguments(base: Mapping[str, str | None], changes: Mapping[str, Any] | None = None) -> list[str]:
    """Return command-line words of `base` with `changes`: a value, None for a switch, False to leave a flag out."""
    merged: dict[str, Any] = {**base, **(changes or {})}
    words: list[str] = []
    for flag, value in merged.items():
        if value is False:
            continue
        words.append(flag)
        if isinstance(value, (list, tuple)):
            words.extend(str(item) for item in value)
        elif value is not None:
            words.append(str(value))
    return words


def train(argv: Sequence[str], *, stop: StopRequest | None = None) -> int:
    """Run the whole program but its process entry on this rank; return the exit code."""
    config = resolve(parse_arguments(list(argv)), int(os.environ.get("WORLD_SIZE", "1")))
    watch = Watch(config.parallel)
    with parallel_context(config, watch.over) as context, watch.explained():
        watch.heartbeat.stage = context.pp_rank
        return build_trainer(config, context, stop or StopRequest(), watch.heartbeat).fit()


def refusal(argv: Sequence[str]) -> str | None:
    """Return the message with which this rank refuses to run, or None when it trained."""
    try:
        train(argv)
    except ConfigError as error:
        return str(error)
    return None


def metrics_rows(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl` in a save directory."""
    return [json.loads(line) for line in (directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def training_rows(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of training iterations."""
    return [row for row in metrics_rows(directory) if "lm_loss" in row]


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, whole, whatever layout wrote it."""
    return read_tensors(directory, stored_entries(directory))


def model_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return the model weights of a checkpoint, optimizer state left out."""
    return {
        name: tensor
        for name, tensor in stored_tensors(directory).items()
        if not name.startswith("optimizer.")
    }


def numbers(directory: Path) -> list[dict[str, Any]]:
    """Return the training rows without times."""
    return [
        {key: value for key, value in row.items() if key not in TIMES} for row in training_rows(directory)
    ]


def assert_bitwise(left: Path, right: Path, iteration: int) -> None:
    """Assert that two checkpoints hold the same bits, optimizer state included."""
    expected, actual = (stored_tensors(directory / f"iter_{iteration:07d}") for directory in (left, right))
    assert expected.keys() == actual.keys()
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert different == []


def largest_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of two sets of tensors; a missing name is an error.

    Rows of vocabulary padding beyond the shorter of two shapes are left out: they depend on the layout.
    """
    assert left.keys() == right.keys(), f"different names: {sorted(left.keys() ^ right.keys())}"
    return max(_difference(left[name], right[name]) for name in left)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    rows = min(a.shape[0], b.shape[0]) if a.dim() else 0
    if a.dim() and a.shape[0] != b.shape[0]:
        a, b = a[:rows], b[:rows]
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def write_token_files(prefix: Path, documents: Iterable[Sequence[int]]) -> None:
    """Write PREFIX.bin and PREFIX.idx of these documents (ids below 65,500), one sequence each."""
    lists = (np.asarray(document, dtype=np.uint16) for document in documents)
    one = np.ones(1, np.int32).tobytes()
    parts = ((ids.tobytes(), np.asarray([len(ids)], dtype=np.int32).tobytes(), one) for ids in lists)
    write_pair(str(prefix), "uint16", parts)
