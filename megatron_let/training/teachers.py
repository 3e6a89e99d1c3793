"""Load the teacher that `--let-teacher-load` names: a Hugging Face directory or a Megatron checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.let import Teacher
from megatron_let.let.hf_teacher import check_hf_teacher, load_hf_teacher
from megatron_let.mcore.checkpoint_reader import check_objects
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.transformer_config import compute_dtype
from megatron_let.training.checkpoint_files import (
    TRACKER,
    hint_at,
    newest_iteration_directory,
    saved_iterations,
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def teacher_format(config: RunConfig) -> str:
    """Return `hf` or `megatron`, by `--let-teacher-format` or by what the directory holds.

    Raises:
        ConfigError: the directory is missing or is neither.
    """
    path = Path(str(config.let.let_teacher_load))
    if not os.path.isdir(path):
        problem = "is not a directory" if os.path.exists(path) else "does not exist"
        raise ConfigError(
            f"--let-teacher-load {path} {problem}; give the directory of a Hugging Face model (downloaded before) "
            "or of a Megatron checkpoint"
        )
    if config.let.let_teacher_format != "auto":
        return str(config.let.let_teacher_format)
    if (path / TRACKER).exists() or saved_iterations(path):
        return "megatron"
    if (path / "config.json").exists():
        return "hf"
    raise ConfigError(
        f"--let-teacher-load {path} holds neither a config.json (Hugging Face) nor a {TRACKER} (Megatron checkpoint)"
        f"{hint_at(path)}"
    )


def teacher_files(path: Path) -> Path | None:
    """Return the directory whose files make the teacher: `path`, or the newest checkpoint below it; None without one."""
    if saved_iterations(path):
        return newest_iteration_directory(path)
    return path if os.path.isdir(path) else None


def teacher_dtype(config: RunConfig) -> torch.dtype:
    """Return the type the teacher computes in: `--let-teacher-dtype`, by default the student's compute type."""
    name = config.let.let_teacher_dtype
    return compute_dtype(config) if name == "auto" else _DTYPES[name]


def check_teacher(config: RunConfig, *, num_ids: int) -> None:
    """Look at the teacher's files before anything large is built: a model, layer N, ids 0 to `num_ids` - 1.

    Raises:
        ConfigError: one of these is not so.
    """
    path, let = Path(str(config.let.let_teacher_load)), config.let
    if teacher_format(config) == "hf":
        model = check_hf_teacher(
            path, layer=let.let_teacher_layer, trust_remote_code=let.let_trust_remote_code
        )
        vocab_size = int(model.vocab_size)
    else:
        from megatron_let.training.megatron_teacher import check_megatron_teacher

        directory, run = check_megatron_teacher(path, layer=let.let_teacher_layer)
        check_objects(directory)
        vocab_size = int(run["vocab_size"])
    require_ids(num_ids, vocab_size, f"teacher {path}")


def require_ids(num_ids: int, vocab_size: int, teacher: str) -> None:
    """Refuse a teacher that knows fewer than the student's `num_ids` token ids.

    Raises:
        ConfigError: it does.
    """
    if num_ids > vocab_size:
        raise ConfigError(
            f"the student's token ids reach {num_ids - 1} but {teacher} knows ids up to {vocab_size - 1}; student "
            "and teacher must use the same tokenizer"
        )


def load_teacher(config: RunConfig, context: ParallelContext) -> Teacher:
    """Load the frozen teacher onto this rank, un-sharded.

    Raises:
        ConfigError: it is missing, damaged, of an unknown kind, or has no such layer.
    """
    path = str(config.let.let_teacher_load)
    if teacher_format(config) == "hf":
        return load_hf_teacher(
            path,
            layer=config.let.let_teacher_layer,
            dtype=teacher_dtype(config),
            device=context.device,
            trust_remote_code=config.let.let_trust_remote_code,
        )
    from megatron_let.training.megatron_teacher import load_megatron_teacher

    return load_megatron_teacher(
        Path(path), layer=config.let.let_teacher_layer, dtype=teacher_dtype(config), context=context
    )
