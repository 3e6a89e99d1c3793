"""Whether the teacher reads a beginning-of-sequence token before the student's, and which: `--let-teacher-bos`.

Models such as Gemma, Llama and OPT have seen nothing without it and are lost where it is missing, while Megatron's data
have none. What a model was trained with is what its tokenizer does when it is simply called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_let.config.run_config import RunConfig
from megatron_let.data.hf_directory import has_tokenizer_files, load_auto_tokenizer
from megatron_let.errors import ConfigError
from megatron_let.training.teachers import teacher_format


def teacher_bos(config: RunConfig) -> int | None:
    """Return the id that goes before each of the run's teacher's segments, None for no such id.

    Raises:
        ConfigError: as bos_of_directory; a Megatron checkpoint names no bos.
    """
    path = Path(str(config.let.let_teacher_load))
    if config.let.let_teacher_bos == "off":
        return None
    return bos_of_directory(path if teacher_format(config) == "hf" else None, config.let.let_teacher_bos)


def bos_of_directory(path: Path | None, choice: str) -> int | None:
    """Return the bos of the tokenizer in a teacher's Hugging Face directory, None where none is put before a text.

    Args:
        path: the directory; None for a teacher of another form, which names no bos.
        choice: auto (what the tokenizer itself does), on or off.

    Raises:
        ConfigError: `on` for a teacher whose tokenizer is not there or has no bos.
    """
    if choice == "off":
        return None
    tokenizer = load_auto_tokenizer(str(path)) if path is not None and has_tokenizer_files(path) else None
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if choice == "auto":
        return int(bos) if bos is not None and _prepends(tokenizer, bos) else None
    if bos is None:
        raise ConfigError(
            f"--let-teacher-bos on: {'a Megatron checkpoint' if path is None else path} holds no tokenizer with a bos token; "
            "put the model's own there, or leave the flag out"
        )
    return int(bos)


def _prepends(tokenizer: Any, bos: int) -> bool:
    """Return whether the tokenizer, simply called, puts its bos before a text."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(ids[:1]) == [bos] and list(bare[:1]) != [bos]
