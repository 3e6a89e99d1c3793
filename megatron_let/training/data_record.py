"""Which data a checkpoint was trained on, in which order: a resume on others is refused, not silently wrong.

A data position is a number of samples. It means the same data only while files, blend, split, sequence length, seed and
batch sizes stay what they were, and the samples are shuffled alike: megatron-core shuffles all epochs of a run together,
so that a run made longer by an epoch reads other samples from the first one on.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_let.config.run_config import RunConfig
from megatron_let.data.digests import add_samples
from megatron_let.data.identity import data_identity
from megatron_let.data.manifest import read_manifest
from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.mcore.datasets import DataSplits, blend_weights, sample_origin, split_parts
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.plain_json import shown

_PROBES = 256
_SAMPLES = 64
_SETTINGS = (
    ("data", "split"),
    ("data", "mock_data"),
    ("model", "seq_length"),
    ("training", "seed"),
    ("training", "global_batch_size"),
    ("training", "rampup_batch_size"),
)


@dataclass(frozen=True)
class DataRecord:
    """What decides which is the n-th sample of a run."""

    settings: dict[str, Any]
    """By flag."""
    weights: list[float] | None
    """Of the blend, their sum 1; None when data sets are joined by size."""
    files: list[str]
    """A fingerprint of each training data set; where it lies does not count."""
    order: list[list[int]]
    """Number of a sample, and where it comes from: data set, document, token in the document."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return asdict(self)


def record_of_data(config: RunConfig, context: ParallelContext) -> DataRecord:
    """Return the record of this run's data, without their order; every rank calls this.

    Raises:
        ConfigError: a file cannot be read.
    """
    return context.on_rank_0(lambda: _record(config))


def with_order(record: DataRecord, data: DataSplits) -> DataRecord:
    """Return the record with the origins of some samples all over the run."""
    count = 0 if data.train is None else len(data.train)  # type: ignore[arg-type]
    numbers = sorted({index * count // _PROBES for index in range(_PROBES)}) if count else []
    return replace(record, order=[[number, *sample_origin(data.train, number)] for number in numbers])


def _record(config: RunConfig) -> DataRecord:
    sections: dict[str, Any] = config.to_dict()
    weights = blend_weights(config, "training")
    return DataRecord(
        settings={f"--{name.replace('_', '-')}": sections[section][name] for section, name in _SETTINGS},
        weights=weights and [round(weight / sum(weights), 12) for weight in weights],
        files=[data_fingerprint(part.prefix) for part in split_parts(config)["training"]],
        order=[],
    )


def data_fingerprint(prefix: str) -> str:
    """Return a digest of a data set: lengths, and the ids by the manifest's checksum or evenly spaced samples.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(data_identity(prefix).encode())
    manifest = read_manifest(prefix)
    if manifest is not None and manifest.bin_sha256:
        digest.update(manifest.bin_sha256.encode())
        return digest.hexdigest()
    add_samples(digest, Path(f"{prefix}.bin"), _SAMPLES)
    return digest.hexdigest()


def check_same_data(
    config: RunConfig, record: DataRecord, saved: dict[str, Any] | None, directory: Path | None
) -> None:
    """Hold this run's data against those that the checkpoint was trained on, if it goes on training.

    Raises:
        ConfigError: they differ, and `--data-override` is not given; the message lists everything in which they do.
    """
    then = _record_of_checkpoint(config, saved)
    if then is None:
        return
    differences = [
        f"{flag} {value} (checkpoint: {shown(then['settings'].get(flag))})"
        for flag, value in record.settings.items()
        if then["settings"].get(flag) != value
    ]
    if record.weights != then["weights"]:
        differences.append(f"blend weights {shown(record.weights)} (checkpoint: {shown(then['weights'])})")
    differences += _changed_files(config, record.files, then["files"])
    _refuse(config, directory, differences)


def check_same_order(
    config: RunConfig, data: DataSplits, saved: dict[str, Any] | None, directory: Path | None
) -> None:
    """Do the same with the order of the samples, once the indices are built.

    Raises:
        ConfigError: as check_same_data.
    """
    then = _record_of_checkpoint(config, saved)
    if then is None or config.data.data_override:  # another blend has another order, and that was said
        return
    count = len(data.train)  # type: ignore[arg-type]
    for number, *origin in then["order"]:
        if number < count and [*sample_origin(data.train, number)] != origin:
            _refuse(
                config, directory, [f"sample {number} is another one: a longer run may shuffle more epochs"]
            )


def _record_of_checkpoint(config: RunConfig, saved: dict[str, Any] | None) -> dict[str, Any] | None:
    is_resumed = not (config.checkpoint.finetune or config.validation.skip_train)
    return None if saved is None or not is_resumed else saved.get("data")


def _refuse(config: RunConfig, directory: Path | None, differences: list[str]) -> None:
    if not differences:
        return
    message = f"checkpoint {directory} was trained on other data: {'; '.join(differences)}"
    if not config.data.data_override:
        raise ConfigError(
            f"{message}; give what it was trained on, or --data-override to go on at the same sample number in these"
        )
    LOGGER.warning(f"{message} (--data-override)")


def _changed_files(config: RunConfig, now: list[str], then: list[str]) -> list[str]:
    if len(now) != len(then):
        return [f"{len(now)} training data sets (checkpoint: {len(then)})"]
    prefixes = [part.prefix for part in split_parts(config)["training"]]
    return [
        f"data set {prefix} holds other tokens"
        for prefix, mine, theirs in zip(prefixes, now, then, strict=True)
        if mine != theirs
    ]
