"""What a run of preprocessing is asked to do, and whether that is possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_let.data.input_paths import refuse_address
from megatron_let.data.sharding import Shard
from megatron_let.errors import ConfigError


@dataclass(frozen=True)
class PreprocessSettings:
    """What to read, what to take from it and where to put it."""

    inputs: tuple[str, ...]
    output_prefix: str
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    input_format: str = "auto"
    text_documents: str = "file"
    subset_key: str = "meta.pile_set_name"
    split_by_subset: bool = False
    subset_weights: Mapping[str, float] = field(default_factory=dict)
    excluded_subsets: tuple[str, ...] = ()
    limit: int | None = None
    """Records after which nothing more is read."""
    shard: Shard | None = None
    """Which part of the files to take."""
    map_documents: bool = False
    list_skipped: bool = False
    max_document_bytes: int = 128 << 20
    invalid_utf8: str = "skip"
    on_error: str = "skip"
    max_error_fraction: float = 0.001
    encoder: str = "auto"
    restart: bool = False
    """Begin anew where an unfinished run lies."""
    workers: int = 1
    log_interval: int = 1000
    commit_seconds: float = 10.0
    """Time between two entries of the journal: the work that a kill can cost."""
    block_bytes: int = 1_000_000
    command: str = ""
    """The command line, for the manifest."""


def check_settings(settings: PreprocessSettings) -> None:
    """Raise ConfigError for what cannot be, before any work."""
    keys, prefix = settings.json_keys, settings.output_prefix
    refuse_address(prefix, f"--output-prefix {prefix}")
    if not keys or len(set(keys)) != len(keys):
        raise ConfigError(f"--json-keys {' '.join(keys)}: each key once, and at least one")
    if any("/" in key for key in keys):
        raise ConfigError(f"--json-keys {' '.join(keys)}: a key with a / cannot be part of a file's name")
    if settings.workers < 1 or settings.log_interval < 1:
        raise ConfigError(
            f"--workers {settings.workers} and --log-interval {settings.log_interval} must be at least 1"
        )
    if not settings.commit_seconds >= 0:
        raise ConfigError(f"--commit-interval {settings.commit_seconds} must be 0 seconds or more")
    if settings.limit is not None and settings.limit < 1:
        raise ConfigError(f"--limit {settings.limit} must be at least 1 record")
    if settings.max_document_bytes < 1:
        raise ConfigError(f"--max-document-bytes {settings.max_document_bytes} must be at least 1")
    if not 0 <= settings.max_error_fraction <= 1:
        raise ConfigError(f"--max-error-fraction {settings.max_error_fraction} must be between 0 and 1")
    if settings.subset_weights and not settings.split_by_subset:
        raise ConfigError("--subset-weights needs --split-by-subset")
    if settings.split_by_subset and (prefix.split() != [prefix] or not prefix.isprintable()):
        raise ConfigError(
            f"--output-prefix {prefix!a}: --data-path could not take it from the blend that --split-by-subset "
            "writes; leave out spaces and what is not text"
        )
