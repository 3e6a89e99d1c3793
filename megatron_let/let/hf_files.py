"""Check a Hugging Face model directory before anything is built from it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_let.errors import ConfigError
from megatron_let.plain_json import fits, is_name, read_json, shown
from megatron_let.regular_files import require_regular_files

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


def config_error(directory: Path, problem: str, cause: Exception | None = None) -> ConfigError:
    """Return the one-line error for a teacher directory, the cause's message shortened behind it."""
    message = f"teacher {directory} {problem}"
    if cause is not None:
        message += f": {shorten(cause)}"
    return ConfigError(message)


def shorten(error: Exception, limit: int = 300) -> str:
    """Return an error's message on one line of at most `limit` characters, or its class where it has none."""
    return shown(" ".join(str(error).split()) or type(error).__name__, limit)


def read_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """Return the `transformers` configuration of a decoder-only language model.

    Raises:
        ConfigError: no such directory, no readable config.json, or not that kind of model.
    """
    if not directory.is_dir():
        raise config_error(directory, "is not a directory" if directory.exists() else "does not exist")
    if not (directory / "config.json").is_file():
        raise config_error(directory, "is not a Hugging Face model: it has no config.json")
    from transformers import AutoConfig

    try:
        require_regular_files(directory, suffixes=SMALL_FILES)
    except OSError as problem:
        raise config_error(
            directory, f"holds a {Path(str(problem.filename)).name} that cannot be read", problem
        ) from problem
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # what transformers raises over a spoilt value depends on where it is used
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise config_error(
                directory,
                "needs Python code of its own to be read; look at its .py files, then pass --let-trust-remote-code",
            ) from error
        raise config_error(directory, "has a config.json that transformers cannot use", error) from error
    kernel = getattr(config, "_attn_implementation", None)
    if not trust_remote_code and kernel is not None and "/" in str(kernel):
        raise config_error(
            directory,
            f"asks for attention code of its own ({str(kernel)[:100]}); pass --let-trust-remote-code to run it",
        )
    if (directory / "adapter_config.json").exists():
        raise config_error(
            directory, "is an adapter of another model; merge it into that one and save the result"
        )
    if config.is_encoder_decoder:
        raise config_error(
            directory, f"is an encoder-decoder ({config.model_type}), not a causal language model"
        )
    if getattr(config, "transformers_weights", None) is not None:
        raise config_error(
            directory,
            "names a weight file of its own in config.json (transformers_weights); take that line out",
        )
    if config.get_text_config() is not config or getattr(config, "num_hidden_layers", None) is None:
        raise config_error(
            directory, f"({config.model_type}) is not a plain text decoder with numbered layers"
        )
    for name in ("num_hidden_layers", "vocab_size"):
        if not fits(getattr(config, name, None), int) or not getattr(config, name):
            raise config_error(
                directory, f"has {name} {shown(getattr(config, name, None))} in its config.json"
            )
    return config


class Stored(NamedTuple):
    """What the weight files of a directory hold, by their headers."""

    tensors: int
    numbers: int


def check_safetensors(directory: Path) -> Stored:
    """Open the header of every weight file, which also compares its length with what the header promises.

    Raises:
        ConfigError: no safetensors weights, a shard missing, or a file cut off or damaged.
    """
    shapes = stored_shapes(directory)
    return Stored(len(shapes), sum(math.prod(shape) for shape in shapes.values()))


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the weight files, by the name that it has there.

    Raises:
        ConfigError: as check_safetensors.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(directory):
        if not file.is_file():
            raise config_error(directory, f"lacks {file.name}, which its {INDEX_FILE} names")
        try:
            with safe_open(file, framework="pt") as content:
                names = list(content.keys())
                shapes |= {name: tuple(content.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise config_error(directory, f"has a damaged or cut-off {file.name}", error) from error
    return shapes


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = set(read_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise config_error(directory, f"has an unreadable {INDEX_FILE}", error) from error
        foreign = sorted(shown(name, 100) for name in names if not _is_weight_file(name))
        if foreign:
            raise config_error(
                directory,
                f"names {foreign[0]} in its {INDEX_FILE}; only .safetensors files of its own directory are loaded, "
                "others can run code when read",
            )
        return sorted(directory / name for name in names)
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise config_error(
            directory,
            f"holds only pickle weights ({pickles[0]}), which can run code when read; load it once where you trust it "
            "and write it with save_pretrained, which makes safetensors",
        )
    raise config_error(directory, f"holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _is_weight_file(name: Any) -> bool:
    """Return whether a name out of an index is one of a safetensors file in the index's own directory."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[^/\0]{1,200}\.safetensors", name) is not None
        and is_name(name)
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's notices and progress bars for a while: every rank would print them, and we check more."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
