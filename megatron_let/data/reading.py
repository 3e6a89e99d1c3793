"""How far the sources of a run are read, and whether they are still those that an earlier run began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_let.data.blocks import START, Block, Position
from megatron_let.data.encoding import EncodedBlock
from megatron_let.data.input_rules import FoundSource, InputRules
from megatron_let.data.manifest import SourceFile
from megatron_let.data.readers import read_blocks
from megatron_let.errors import ConfigError

_CHUNK_BYTES = 1 << 22


@dataclass
class Reading:
    """The sources in order, the first few of them read to the end, the next one up to `position`."""

    sources: Sequence[FoundSource]
    finished: list[SourceFile] = field(default_factory=list)
    position: Position = START

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
            self.position = START

    @property
    def disk_bytes(self) -> int:
        """Bytes read of all files."""
        return sum(source.size for source in self.finished) + self.position.disk_bytes

    @property
    def total_bytes(self) -> int | None:
        """Size of all files, None when standard input is among them."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(size or 0 for size in sizes)

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
        then = {path: (size, mtime_ns) for path, size, mtime_ns in state["files"]}
        now = {source.path: source for source in self.sources}
        if list(then) != list(now):
            other = next(iter(sorted(then.keys() ^ now.keys())), "their order")
            raise _changed(f"--input names other files than the stopped run ({other})")
        self.finished = [SourceFile(**source) for source in state["finished"]]
        self.position = Position(**state["position"])
        for path, (size, _) in then.items():
            if now[path].size != size:
                raise _changed(
                    f"input {path} had {size} bytes when the stopped run began, it has {now[path].size}"
                )
        for source in self.finished:
            is_touched = now[source.path].mtime_ns != then[source.path][1]
            if is_touched and sha256_of(source.path) != source.sha256:
                raise _changed(f"input {source.path} has changed since the stopped run read it")


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _changed(what: str) -> ConfigError:
    return ConfigError(f"{what}: give the same input, or --restart to begin anew")
