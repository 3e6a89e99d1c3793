"""Tokenizers kept in the Hugging Face form: a directory (or a name in the local cache) read by transformers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_let.errors import ConfigError, MissingFilesError
from megatron_let.plain_json import shown
from megatron_let.regular_files import require_regular_files

# Any one of these makes a directory a tokenizer directory.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def has_tokenizer_files(path: str | Path) -> bool:
    """Return whether the directory `path` holds at least one file of a Hugging Face tokenizer."""
    return any(os.path.isfile(Path(path) / name) for name in TOKENIZER_FILES)


def load_auto_tokenizer(name_or_path: str, *, without_torch: bool = False) -> Any:
    """Load a tokenizer with transformers' AutoTokenizer, from local files and without remote code.

    A directory is read in place; any other string is looked up in the local Hugging Face cache. The network
    is never asked. Truncation and padding stored with the tokenizer are switched off: they would cut documents.

    without_torch: keep transformers from importing torch, which takes most of a short program's time. Only for a
    program that never trains: transformers then takes torch for absent as long as the process lives.

    Raises:
        ConfigError: nothing is found, the directory has no tokenizer, or it needs code of its own.
    """
    is_directory = os.path.isdir(name_or_path)
    if is_directory and not has_tokenizer_files(name_or_path):
        raise MissingFilesError(
            f"no tokenizer in directory {name_or_path}: expected tokenizer.json or tokenizer_config.json"
        )
    if is_directory:
        _require_regular_files(name_or_path)
    if os.path.isfile(name_or_path):
        raise ConfigError(
            f"{name_or_path} is a file: HuggingFaceTokenizer takes a directory "
            "(SentencePieceTokenizer takes a .model file)"
        )
    try:
        tokenizer = _read_without_torch(name_or_path) if without_torch else _read(name_or_path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises anything, and the Rust below it what is no Exception
        if not is_directory:
            raise MissingFilesError(
                f"tokenizer {name_or_path} is neither a directory nor in the local Hugging Face cache"
            ) from error
        raise ConfigError(f"cannot load the tokenizer in {name_or_path}: {first_line(error)}") from error
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _require_regular_files(directory: str) -> None:
    try:
        require_regular_files(directory, suffixes=(".json", ".jinja", ".model", ".txt", ".tiktoken"))
    except OSError as problem:
        raise ConfigError(
            f"cannot load the tokenizer in {directory}: {problem.filename}: {problem.strerror}"
        ) from problem


def _read(name_or_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True, trust_remote_code=False)


def _read_without_torch(name_or_path: str) -> Any:
    if "torch" in sys.modules or "transformers" in sys.modules:  # nothing left to save
        return _read(name_or_path)
    with _torch_hidden():
        return _read(name_or_path)


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Make `import torch` fail, as None in sys.modules does, and keep transformers from remarking on it."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before


def file_in(name_or_path: str, name: str) -> Path | None:
    """Return where the file `name` of a tokenizer lies, in its directory or the local Hugging Face cache."""
    if os.path.isdir(name_or_path):
        path = Path(name_or_path) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        name_or_path,
        name,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def is_rebuilt_by_class(tokenizer: Any) -> bool:
    """Return whether transformers took vocabulary and merges from tokenizer.json and the rest from the class."""
    return "__init__" in vars(type(tokenizer)) and type(tokenizer).__name__ != "TokenizersBackend"


def token_to_id_of(tokenizer: Any) -> dict[str, int]:
    """Return the full map of a transformers tokenizer, added tokens included."""
    return {str(token): int(token_id) for token, token_id in tokenizer.get_vocab().items()}


def end_of_document_id_of(tokenizer: Any) -> int | None:
    """Return the id that ends a document: eos, or sep where there is no eos (Megatron's wrapper does the same)."""
    token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return None if token_id is None else int(token_id)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, which may fill a page."""
    return shown(next(iter(str(error).splitlines()), type(error).__name__).strip(), 300)
