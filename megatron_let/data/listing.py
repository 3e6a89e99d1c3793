"""PREFIX_KEY_skipped.jsonl: the place of every record that gave no document, a JSON line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_let.data.encoding import Skipped
from megatron_let.data.growing_file import GrowingFile
from megatron_let.plain_json import require_fields


@dataclass(frozen=True)
class _ListingState:
    """How much of a listing is on the disk."""

    size: int
    digest: str


class SkippedListing:
    """One listing for each JSON key, under working names until the run is done."""

    def __init__(self, directory: Path, keys: Sequence[str]) -> None:
        self._paths = {key: directory / f"{index:04d}.skipped" for index, key in enumerate(keys)}
        self._files: dict[str, GrowingFile] = {}
        self._sizes = dict.fromkeys(keys, 0)

    def add(self, key: str, path: str, skipped: Sequence[Skipped]) -> None:
        """Append records of one source."""
        lines = [
            orjson.dumps(
                {
                    "file": path.encode("utf-8", "backslashreplace").decode("utf-8"),
                    "record": item.record,
                    "byte": item.byte,
                    "reason": item.reason,
                    **({"count": item.count} if item.count > 1 else {}),
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for item in skipped
        ]
        content = b"".join(lines)
        self._file(key).write(content)
        self._sizes[key] += len(content)

    def sync(self) -> dict[str, Any]:
        """Bring everything to the disk and return, in JSON values, what is there."""
        return {key: {"size": self._sizes[key], "digest": self._file(key).sync()} for key in self._paths}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from what `sync` returned to a run that was stopped.

        Raises:
            ConfigError: the files do not hold what it says.
            ValueError, KeyError, TypeError: it is nothing that `sync` returns.
        """
        for key, path in self._paths.items():
            require_fields(_ListingState, state[key])
            self._files[key] = GrowingFile(path, is_new=not path.exists())
            self._files[key].cut_back(state[key]["size"], state[key]["digest"])
            self._sizes[key] = state[key]["size"]

    def finished(self) -> list[list[str]]:
        """Return the working names and what follows the output prefix in the final ones."""
        return [[path.name, f"_{key}_skipped.jsonl"] for key, path in self._paths.items()]

    def close(self) -> None:
        """Close the files, which stay."""
        for file in self._files.values():
            file.close()

    def _file(self, key: str) -> GrowingFile:
        if key not in self._files:
            self._files[key] = GrowingFile(self._paths[key], is_new=True)
        return self._files[key]
