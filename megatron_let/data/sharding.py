"""One job of preprocessing over many nodes: each takes whole files that follow each other, and merging joins the pairs.

Merged in the order of the shards the pairs have the bytes of one run over all files.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_let.data.input_rules import FoundSource
from megatron_let.data.manifest import Manifest
from megatron_let.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """Shard `index`, from 0, of `count`."""

    index: int
    count: int

    @property
    def suffix(self) -> str:
        """Return what follows the output prefix, so that names sort in the order of the shards."""
        return f"-{self.index:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_shard(word: str) -> Shard:
    """Return the shard of an I/N word.

    Raises:
        ConfigError: another form, or an I that is not below N.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", word)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(
            f"--shard {word}: give I/N, where I counts from 0 to N - 1 (SLURM_PROCID/SLURM_NTASKS)"
        )
    return Shard(int(found[1]), int(found[2]))


def sources_of_shard(sources: Sequence[FoundSource], shard: Shard) -> tuple[FoundSource, ...]:
    """Return the shard's files: near the same bytes for each shard, and at least one file.

    Raises:
        ConfigError: there are fewer files than shards, or standard input is among them.
    """
    sizes = [source.size for source in sources]
    if None in sizes:
        raise ConfigError(f"--shard {shard}: standard input cannot be divided among nodes, name files")
    if len(sources) < shard.count:
        raise ConfigError(
            f"--shard {shard}: a shard takes whole files, and there are {len(sources)}: give at most so many shards"
        )
    first, last = _bounds([size or 0 for size in sizes], shard)
    return tuple(sources[first:last])


def identity_of(sources: Iterable[FoundSource]) -> str:
    """Return a digest of all files of a job: nodes that see others do not make shards of one."""
    files = [(source.path, source.size) for source in sources]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def require_whole_jobs(manifests: Iterable[Manifest]) -> None:
    """Check that of each job that was done in shards every shard is there once.

    Pairs by subset are left out of it: a shard may have nothing of a subset.

    Raises:
        ConfigError: one is missing or comes twice.
    """
    jobs = defaultdict[tuple[str, str, int], list[int]](list)
    for manifest in manifests:
        if manifest.shard and manifest.subset is None:
            shard = parse_shard(manifest.shard)
            jobs[manifest.shard_of, manifest.json_key, shard.count].append(shard.index)
    for (_, key, count), indices in jobs.items():
        missing = sorted(set(range(count)) - set(indices))
        if missing:
            raise ConfigError(
                f"--input holds {len(set(indices)):,} of the {count:,} shards of one job ({key}), shard {missing[0]}/{count} is "
                "missing: run it too, with the very input that the others saw"
            )
        index, times = Counter(indices).most_common(1)[0]
        if times > 1:
            raise ConfigError(f"--input holds shard {index}/{count} ({key}) {times} times: give it once")


def _bounds(sizes: Sequence[int], shard: Shard) -> tuple[int, int]:
    """Return the first file of the shard and of the next one. A file belongs where its middle lies."""
    total = sum(sizes)
    middles = [2 * end - size for size, end in zip(sizes, accumulate(sizes), strict=True)]
    bounds = [0]
    for number in range(1, shard.count + 1):
        wanted = bisect_left(middles, -(-2 * total * number // shard.count))
        most = len(sizes) - shard.count + number
        bounds.append(max(bounds[-1] + 1, min(wanted, most)))
        if number > shard.index:
            break
    return bounds[shard.index], len(sizes) if shard.index == shard.count - 1 else bounds[shard.index + 1]
