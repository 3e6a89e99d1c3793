"""Do all nodes see the same things? A copy of the data, the tokenizer or the teacher on another node may be another one.

Rank 0's are checked against each other elsewhere; here one rank of every node (the first) holds its own against rank
0's, by digests that cost it a few reads.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import megatron_let
from megatron_let.config.run_config import RunConfig
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.errors import ConfigError
from megatron_let.mcore.datasets import split_parts
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.regular_files import read_bytes
from megatron_let.training.checkpoint_files import MANIFEST
from megatron_let.training.data_record import DataRecord, data_fingerprint
from megatron_let.training.let_record import LetRecord

_SHOWN = 12


@dataclass(frozen=True)
class NodeFacts:
    """What one rank sees, each by a short value; the keys say what it is, in words that fit "sees another ..."."""

    rank: int
    host: str
    values: Mapping[str, str]


def check_nodes(
    config: RunConfig,
    context: ParallelContext,
    tokenizer: Tokenizer,
    teacher: LetRecord | None,
    checkpoint: Path | None,
) -> None:
    """Compare code, tokenizer, data sets, teacher and checkpoint over the nodes; every rank calls this.

    `teacher` and `checkpoint`: None where the run needs none.

    Raises:
        ConfigError: a node sees others than rank 0, or cannot read them.
    """

    def look() -> NodeFacts | None:
        if context.rank != 0 and context.local_rank != 0:
            return None
        host = socket.gethostname()
        try:
            values = _software() | _files(config, checkpoint)
        except (OSError, ConfigError) as problem:
            raise ConfigError(
                f"rank {context.rank} on {host}: {problem}; all nodes must see the same files"
            ) from problem
        values["tokenizer"] = json.dumps(tokenizer.unique_identifiers, sort_keys=True)
        if teacher is not None:
            values[f"teacher {config.let.let_teacher_load}"] = str(teacher.teacher_identity)
        return NodeFacts(context.rank, host, values)

    require_agreement(context.gather(context.together(look)))


def check_order_on_nodes(context: ParallelContext, record: DataRecord) -> None:
    """Compare which samples the built indices name, on every rank; every rank calls this.

    Raises:
        ConfigError: a rank would train on others than rank 0, though the files are the same.
    """
    values = {"order of the samples (remove its index cache)": _digest(json.dumps(record.order).encode())}
    require_agreement(context.gather(NodeFacts(context.rank, socket.gethostname(), values)))


def require_agreement(everyone: Sequence[NodeFacts | None]) -> None:
    """Raise ConfigError when a rank sees something else than rank 0, by rank, host and what differs."""
    first = everyone[0]
    assert first is not None, "rank 0 always looks"
    for other in everyone:
        if other is None:
            continue
        different = [
            f"{name} ({other.values.get(name, 'none')[:_SHOWN]}, there {first.values.get(name, 'none')[:_SHOWN]})"
            for name in sorted(first.values.keys() | other.values.keys())
            if first.values.get(name) != other.values.get(name)
        ]
        if different:
            more = f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise ConfigError(
                f"rank {other.rank} on {other.host} sees another {'; another '.join(different[:4])}{more} than rank 0 on "
                f"{first.host}; give all nodes the same files"
            )


def _files(config: RunConfig, checkpoint: Path | None) -> dict[str, str]:
    """Return a digest of every data set and of the checkpoint's manifest, which holds those of its files."""
    prefixes = {part.prefix for parts in split_parts(config).values() for part in parts}
    values = {f"data set {prefix}": data_fingerprint(prefix) for prefix in sorted(prefixes)}
    if checkpoint is not None:
        values[f"checkpoint {checkpoint}"] = _digest(read_bytes(checkpoint / MANIFEST))
    return values


def _software() -> dict[str, str]:
    """Return what reads tokens and teacher, and a digest of this package: two checkouts of one version may differ."""
    values = {}
    for name in ("transformers", "tokenizers"):
        with suppress(metadata.PackageNotFoundError):
            values[f"{name} package"] = metadata.version(name)
    root = Path(megatron_let.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + read_bytes(path))
    return {**values, "megatron_let (its source)": digest.hexdigest()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
