"""How far the sources of a run are read, and whether they are still those that an earlier run began with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_let.data.blocks import START, Block, Position
from megatron_let.data.digests import sha256_of, sha256_of_stream
from megatron_let.data.encoding import EncodedBlock
from megatron_let.data.input_rules import STANDARD_INPUT, FoundSource, InputRules
from megatron_let.data.manifest import SourceFile
from megatron_let.data.raw_stream import standard_input
from megatron_let.data.readers import read_blocks
from megatron_let.errors import ConfigError
from megatron_let.plain_json import fits, require_fields, shown


@dataclass
class Reading:
    """The sources in order, the first few of them read to the end, the next one up to `position`."""

    sources: Sequence[FoundSource]
    finished: list[SourceFile] = field(default_factory=list)
    position: Position = START
    _finished_bytes: int = field(default=0, init=False)

    def blocks(self, rules: InputRules) -> Iterator[Block]:
        """Yield what is left to read.

        Raises:
            ConfigError: a file is damaged, or not the one that was read before.
        """
        start = self.position
        for source in self.sources[len(self.finished) :]:
            yield from read_blocks(source, rules, start)
            start = START

    def advance(self, block: EncodedBlock) -> None:
        """Note that a block, the next in order, is written."""
        self.position = block.end
        if block.is_last:
            self.finished.append(SourceFile(block.path, block.end.disk_bytes, block.end.digest))
            self._finished_bytes += block.end.disk_bytes
            self.position = START

    @property
    def disk_bytes(self) -> int:
        """Bytes read of all files."""
        return self._finished_bytes + self.position.disk_bytes

    @property
    def total_bytes(self) -> int | None:
        """Size of all files, None when standard input is among them."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def read(self) -> list[SourceFile]:
        """Return what is read to its end, and the one of which only a part is, without digest."""
        if self.position == START:
            return self.finished
        source = self.sources[len(self.finished)]
        size = self.position.disk_bytes if source.size is None else source.size
        return [*self.finished, SourceFile(source.path, size)]

    def state(self) -> dict[str, Any]:
        """Return the reading in JSON values."""
        return {
            "files": [[source.path, source.size, source.mtime_ns] for source in self.sources],
            "finished": [asdict(source) for source in self.finished],
            "position": asdict(self.position),
        }

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned to a run that was stopped.

        Raises:
            ConfigError: the sources are not the same. (The one in the middle of which it stopped is checked when it
                is read.)
        """
        _require_state(state)
        then = [path for path, _, _ in state["files"]]
        now = [source.path for source in self.sources]
        if then != now:
            other = next(iter(sorted(set(then) ^ set(now))), "their order")
            raise _changed(
                f"--input names other files than the stopped run ({shown(os.path.basename(other))})"
            )
        require_unchanged(state)
        self.finished = [SourceFile(**source) for source in state["finished"]]
        self.position = Position(**state["position"])
        self._finished_bytes = sum(source.size for source in self.finished)


def require_unchanged(state: Mapping[str, Any]) -> None:
    """Check that the sources are what they were when `Reading.state` was taken; those that are gone are left out.

    Raises:
        ConfigError: a source has another size, or one that was read to its end has other content.
    """
    _require_state(state)
    digests = {source["path"]: source["sha256"] for source in state["finished"]}
    for path, size, mtime_ns in state["files"]:
        if path == STANDARD_INPUT:
            is_same = path not in digests or sha256_of_stream(standard_input()) == digests[path]
        elif not os.path.exists(path):
            continue
        else:
            status = os.stat(path)
            if status.st_size != size:
                raise _changed(
                    f"input {path} had {size} bytes when the stopped run began, it has {status.st_size}"
                )
            is_touched = status.st_mtime_ns != mtime_ns
            is_same = not is_touched or path not in digests or sha256_of(path) == digests[path]
        if not is_same:
            raise _changed(f"input {path} has changed since the stopped run read it")


def _require_state(state: Any) -> None:
    """Raise ValueError, KeyError or TypeError for what `Reading.state` does not return."""
    for path, *numbers in state["files"]:
        if not fits(path, str) or not fits(numbers, list[int | None]):
            raise ValueError(f"{shown(path)} as a file")
    for source in state["finished"]:
        require_fields(SourceFile, source)
    require_fields(Position, state["position"])
    if len(state["finished"]) > len(state["files"]):
        raise ValueError("more files are read than there are")


def _changed(what: str) -> ConfigError:
    return ConfigError(f"{what}: give the same input, or --restart to begin anew")
