"""Going on with a stopped run: whether it is the same run, and putting finished files under their names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_let import __version__
from megatron_let.data.indexed_writer import install_pair
from megatron_let.data.journal import Journal, WorkingDirectory, changed_arguments
from megatron_let.data.manifest import Manifest, read_manifest
from megatron_let.data.preprocess_settings import PreprocessSettings
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.errors import ConfigError, LetError
from megatron_let.plain_json import is_name, read_json, shown


def arguments_of(settings: PreprocessSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what decides over the bytes, in JSON values."""
    definition = hashlib.sha256(tokenizer.batch_encoder().definition()).hexdigest()
    # What was not there before is noted where it is used, so that an older run can be gone on with.
    later = {
        "--exclude-subset": list(settings.excluded_subsets),
        "--limit": settings.limit,
        "--document-map": settings.map_documents,
        "--shard": str(settings.shard or ""),
        "--skipped-file": settings.list_skipped,
    }
    return {
        **{flag: value for flag, value in later.items() if value},
        "--input": list(settings.inputs),
        "--json-keys": list(settings.json_keys),
        "--append-eod": settings.append_eod,
        "--input-format": settings.input_format,
        "--text-documents": settings.text_documents,
        "--subset-key": settings.subset_key,
        "--split-by-subset": settings.split_by_subset,
        "--max-document-bytes": settings.max_document_bytes,
        "--invalid-utf8": settings.invalid_utf8,
        "the tokenizer": [definition, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod],
        "versions": {
            "megatron_let": __version__,
            "tokenizers": version("tokenizers"),
            "sentencepiece": version("sentencepiece"),
        },
    }


def require_same(journal: Journal, arguments: Mapping[str, Any], directory: Path) -> None:
    """Raise ConfigError unless a run with `arguments` goes on with the one of the journal."""
    if changes := changed_arguments(arguments, journal.arguments):
        raise ConfigError(
            f"a stopped run lies under this --output-prefix ({directory}), with other arguments ({changes}): give the "
            "same to go on, or --restart to begin anew"
        )


def require_installable(progress: Mapping[str, Any]) -> None:
    """Check that the journal names files of its own directory, and names beside the output prefix.

    Raises:
        ValueError, KeyError, TypeError: it does not.
    """
    for working, final in [*progress["pairs"], *progress["files"]]:
        if not is_name(working) or not is_name(final) or "/" in working + final or working in ("", ".", ".."):
            raise ValueError(f"{shown(working)} and {shown(final)} as names of files")
        if not final.startswith("_"):
            raise ValueError(f"{shown(final)} as the end of a name")


def install(
    directory: WorkingDirectory, journal: Journal, prefix: str, write_line: Callable[[str], None]
) -> dict[str, Manifest]:
    """Put complete pairs under their names, those that a killed run did not get to as well; return their manifests.

    Raises:
        LetError: a file cannot be put there.
    """
    paths = [f"{prefix}{name}" for _, name in journal.progress["pairs"]]
    try:
        for (stem, _), path in zip(journal.progress["pairs"], paths, strict=True):
            install_pair(directory.path / stem, path)
        for name, suffix in journal.progress["files"]:
            _install_file(directory.path / name, Path(f"{prefix}{suffix}"), paths, write_line)
        found = {path: read_manifest(path) for path in paths}
        directory.remove()
    except OSError as error:
        raise LetError(
            f"cannot put the finished files under {prefix}: {error}; the same command does it, without encoding again"
        ) from error
    return {path: manifest for path, manifest in found.items() if manifest is not None}


def _install_file(new: Path, final: Path, paths: list[str], write_line: Callable[[str], None]) -> None:
    """Put a file about subsets under its name; say which pairs of an earlier run no longer belong to the blend."""
    if not new.exists():
        return
    if final.suffix == ".json" and final.exists():
        try:
            earlier = read_json(final)["subsets"].values()
            stale = [entry["prefix"] for entry in earlier if entry["prefix"] not in paths]
        except (ValueError, KeyError, TypeError, AttributeError):
            stale = []  # not a file of ours; it is replaced all the same, as everything under this name
        for path in stale:
            write_line(f"{shown(path, 300)} is of an earlier run, and not in the blend")
    new.replace(final)
