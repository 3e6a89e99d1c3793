"""Where a pair comes from: what was read and what was left out, when, by which command, encoder and versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from megatron_let import __version__
from megatron_let.data.input_rules import UnreadFile
from megatron_let.data.manifest import MAX_SKIPPED_EXAMPLES, SourceFile
from megatron_let.data.sources import counted_by_reason

_LIBRARIES = ("tokenizers", "sentencepiece", "transformers", "gigatoken", "pyarrow", "numpy")


@dataclass(frozen=True)
class Origin:
    """What the manifests of a run say of its inputs and of itself."""

    sources: Sequence[SourceFile]
    unread: Sequence[UnreadFile]
    made: dict[str, str]
    shard: str = ""
    shard_of: str = ""

    @property
    def unread_counts(self) -> dict[str, int]:
        """Return the number of files that were left out, by reason."""
        return counted_by_reason(self.unread)

    @property
    def unread_examples(self) -> tuple[str, ...]:
        """Return the first of them in words."""
        return tuple(f"{file.path}: {file.reason}" for file in self.unread[:MAX_SKIPPED_EXAMPLES])


def made_now(command: str, encoder: str = "", libraries: Iterable[str] = _LIBRARIES) -> dict[str, str]:
    """Return when and by what a file is made. The time is UTC; `encoder` says which, where one had a part."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        **({"encoder": encoder} if encoder else {}),
        "megatron_let": __version__,
        "python": platform.python_version(),
        **{name: found for name in libraries if (found := _version_of(name))},
    }


def _version_of(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
