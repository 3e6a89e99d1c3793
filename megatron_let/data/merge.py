"""Join pairs of token files into one, in the order given: tables in 64-bit numbers, contents never in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_let import __version__
from megatron_let.data.digests import sha256_while_reading
from megatron_let.data.document_map import merged_rows, open_map, write_map
from megatron_let.data.index_tables import CHUNK, IndexTables, open_tables
from megatron_let.data.indexed import IndexedSummary, check_indexed
from megatron_let.data.indexed_writer import IndexedWriter, install_pair
from megatron_let.data.input_paths import refuse_address
from megatron_let.data.journal import WorkingDirectory
from megatron_let.data.manifest import (
    MAX_SKIPPED_EXAMPLES,
    Manifest,
    SubsetCount,
    read_manifest,
    require_manifest_of,
    write_manifest,
)
from megatron_let.data.origin import made_now
from megatron_let.data.recorded_tokenizer import difference_of_manifests
from megatron_let.data.sharding import require_whole_jobs
from megatron_let.errors import ConfigError, LetError
from megatron_let.log import LOGGER

_CHUNK_BYTES = 1 << 24


def find_pairs(inputs: Sequence[str]) -> list[str]:
    """Return the prefixes that `inputs` name: prefixes, or directories whose pairs are taken sorted by name.

    Raises:
        ConfigError: nothing is named, a directory has no pair or half of one, a pair comes twice.
    """
    prefixes: list[str] = []
    for name in inputs:
        refuse_address(name, f"--input {name}")
        if not Path(name).is_dir():
            prefixes.append(name)
            continue
        stems = sorted(
            {path.with_suffix("") for path in Path(name).iterdir() if path.suffix in (".bin", ".idx")}
        )
        if not stems:
            raise ConfigError(f"--input {name}: the directory has no .bin and .idx files")
        prefixes += [str(stem) for stem in stems]
    for prefix, count in Counter(str(Path(prefix).resolve()) for prefix in prefixes).items():
        if count > 1:
            raise ConfigError(f"--input: {prefix} is given twice, its documents would be counted twice")
    return prefixes


def merge(
    prefixes: Sequence[str], output_prefix: str, write_line: Callable[[str], None], command: str = ""
) -> tuple[IndexedSummary, Manifest | None]:
    """Write OUTPUT_PREFIX.{bin,idx,manifest.json} with the documents of all pairs; return what it holds.

    `command` is noted in the manifest. Without a manifest beside every input there is none for the result, and `write_line` says so.

    Raises:
        ConfigError: no input, a damaged one, one shard of a job without the others, one whose checksum is not its manifest's, two with the same tokens,
            another id type or tokenizer, an output that is an input or that a stopped run is to go on with.
        LetError: the disk is full.
    """
    refuse_address(output_prefix, f"--output-prefix {output_prefix}")
    if not prefixes:
        raise ConfigError("--input names no pair")
    summaries = [check_indexed(prefix) for prefix in prefixes]
    manifests = [_manifest_of(summary) for summary in summaries]
    _check_same(summaries, manifests)
    require_whole_jobs(manifest for manifest in manifests if manifest is not None)
    seen: dict[str, str] = {}
    for summary, manifest in zip(summaries, manifests, strict=True):
        _refuse_copy(summary.prefix, "" if manifest is None else manifest.bin_sha256, seen)
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise ConfigError(f"--output-prefix {output_prefix} is one of the inputs: give another name")
    try:
        with WorkingDirectory(output_prefix, prefixes) as directory:
            _refuse_stopped_run(directory, output_prefix)
            directory.clear()
            stem = directory.path / "merged"
            with IndexedWriter(stem, summaries[0].dtype) as writer:
                for summary, manifest in zip(summaries, manifests, strict=True):
                    digest = _append(writer, summary, "" if manifest is None else manifest.bin_sha256)
                    _refuse_copy(summary.prefix, digest, seen)
                    write_line(
                        f"{summary.prefix}: {summary.documents:,} documents, {summary.tokens:,} tokens"
                    )
                digests = writer.complete()
            known = [manifest for manifest in manifests if manifest is not None]
            merged = _merged_manifest(known, digests, command) if len(known) == len(manifests) else None
            if merged is not None:
                _write_map(stem, summaries, known, write_line)
            if merged is None:
                absent = next(
                    s.prefix for s, manifest in zip(summaries, manifests, strict=True) if manifest is None
                )
                write_line(
                    f"no manifest is written: {absent} has none (tools/inspect_data.py --add-manifest adds one)"
                )
            else:
                write_manifest(str(stem), merged)
            install_pair(stem, output_prefix)
    except OSError as error:
        raise LetError(f"cannot write {output_prefix}: {error.strerror}; nothing was written over") from error
    return check_indexed(output_prefix), merged


def _write_map(
    stem: Path,
    summaries: Sequence[IndexedSummary],
    manifests: Sequence[Manifest],
    write_line: Callable[[str], None],
) -> None:
    """Join the document maps, if every pair has one."""
    maps = [open_map(summary.prefix, summary.documents) for summary in summaries]
    absent = [summary.prefix for summary, rows in zip(summaries, maps, strict=True) if rows is None]
    if not absent:
        rows = merged_rows(maps, [manifest.sources for manifest in manifests])
        write_map(stem, sum(map(len, maps)), rows)
    elif len(absent) < len(maps):
        write_line(f"no document map is written: {absent[0]} has none")


def _refuse_stopped_run(directory: WorkingDirectory, output_prefix: str) -> None:
    try:
        is_stopped = directory.read_journal() is not None
    except ConfigError:  # what it says cannot be read: it is no less someone's work
        is_stopped = True
    if is_stopped:
        raise ConfigError(
            f"--output-prefix {output_prefix}: a stopped run of preprocessing lies in {directory.path}; let it go on, "
            "delete that directory, or give another name"
        )


def _manifest_of(summary: IndexedSummary) -> Manifest | None:
    manifest = read_manifest(summary.prefix)
    if manifest is not None:
        require_manifest_of(manifest, summary)
    return manifest


def _check_same(summaries: Sequence[IndexedSummary], manifests: Sequence[Manifest | None]) -> None:
    """Refuse pairs that would not be one data set."""
    for other in summaries[1:]:
        if other.dtype != summaries[0].dtype:
            raise ConfigError(
                f"{summaries[0].prefix} holds {summaries[0].dtype} ids and {other.prefix} {other.dtype}: they were made "
                "with vocabularies of different size"
            )
    known = [
        (summary.prefix, manifest)
        for summary, manifest in zip(summaries, manifests, strict=True)
        if manifest is not None
    ]
    silent = [
        prefix
        for prefix, manifest in known
        if manifest.tokenizer_fingerprint and not manifest.encoding_fingerprint
    ]
    if silent:
        LOGGER.warning(
            f"{silent[0]} does not say how its tokenizer encodes: its vocabulary alone is compared"
            f"{f' (and {len(silent) - 1} more)' if len(silent) > 1 else ''}"
        )
    telling = [pair for pair in known if pair[1].encoding_fingerprint]
    for (first_prefix, first), (prefix, manifest) in (*_with_first(known), *_with_first(telling)):
        difference = difference_of_manifests(first, manifest)
        if difference:
            raise ConfigError(
                f"{first_prefix} and {prefix} differ in their tokenizers, {difference}; one data set needs one: "
                "preprocess one of them again"
            )
        if first.append_eod != manifest.append_eod:
            raise ConfigError(
                f"{first_prefix} and {prefix} differ in append_eod ({first.append_eod} and {manifest.append_eod}): give "
                "them to training as a blend, or preprocess one again"
            )


def _with_first(
    known: Sequence[tuple[str, Manifest]],
) -> list[tuple[tuple[str, Manifest], tuple[str, Manifest]]]:
    return [(known[0], other) for other in known[1:]]


def _refuse_copy(prefix: str, bin_sha256: str, seen: dict[str, str]) -> None:
    """Note whose tokens have this digest. Raises ConfigError when another pair's have it too."""
    other = seen.setdefault(bin_sha256, prefix) if bin_sha256 else prefix
    if other != prefix:
        raise ConfigError(
            f"{other}.bin and {prefix}.bin have the same content: their documents would be counted twice; give one of "
            "them"
        )


def _append(writer: IndexedWriter, summary: IndexedSummary, bin_sha256: str) -> str:
    """Append one pair: bounds, lengths, then tokens, each in pieces; return the SHA-256 of the tokens."""
    tables = open_tables(summary.prefix)
    for bounds in _bounds(tables):
        writer.add_bounds(bounds)
    for lengths in _lengths(tables):
        writer.add_lengths(lengths)
    found = sha256_while_reading(f"{summary.prefix}.bin", writer.add_tokens, _CHUNK_BYTES)
    if bin_sha256 and found != bin_sha256:
        raise ConfigError(
            f"{summary.prefix}.bin is not the file that its manifest describes (SHA-256 differs): preprocess it again"
        )
    return found


def _bounds(tables: IndexTables) -> Iterator[Any]:
    """Yield int64 [n]: the sequence behind each document's last."""
    last = 0
    for first in range(1, tables.header.bounds, CHUNK):
        bounds = np.array(tables.bounds[first : first + CHUNK])
        if (np.diff(bounds, prepend=last) < 0).any():
            raise ConfigError(f"{tables.prefix}.idx: documents are out of order; preprocess the data again")
        last = int(bounds[-1])
        yield bounds


def _lengths(tables: IndexTables) -> Iterator[Any]:
    """Yield int32 [n] lengths; the sequences must lie back to back from the first byte of .bin on."""
    expected = 0
    for first in range(0, tables.header.sequences, CHUNK):
        lengths = np.array(tables.lengths[first : first + CHUNK])
        pointers = np.array(tables.pointers[first : first + CHUNK])
        ends = expected + np.cumsum(lengths, dtype=np.int64) * tables.header.width
        if (lengths < 0).any() or pointers[0] != expected or (pointers[1:] != ends[:-1]).any():
            raise ConfigError(
                f"{tables.prefix}.idx: sequences do not lie back to back; preprocess the data again"
            )
        expected = int(ends[-1])
        yield lengths


def _merged_manifest(manifests: Sequence[Manifest], digests: tuple[str, str], command: str) -> Manifest:
    skipped: Counter[str] = Counter()
    subsets: dict[str, SubsetCount] = {}
    for manifest in manifests:
        skipped.update(manifest.skipped)
        for name, count in manifest.subsets.items():
            subsets[name] = subsets.get(name, SubsetCount()) + count
    # Pairs of one run, as it writes for each subset, have their sources in common.
    sources = dict.fromkeys(source for manifest in manifests for source in manifest.sources)
    examples = [example for manifest in manifests for example in manifest.skipped_examples]
    unread: Counter[str] = Counter()
    unread_examples: list[str] = []
    # Once a job: its pairs, and its shards, tell of the same files.
    for left_out in {manifest.shard_of or manifest.sources: manifest for manifest in manifests}.values():
        unread.update(left_out.unread)
        unread_examples += left_out.unread_examples
    sums = ("documents", "sequences", "tokens", "bytes", "records", "eod_in_text")
    names = {manifest.subset for manifest in manifests}
    encodings = {manifest.encoding_fingerprint for manifest in manifests}
    keys = dict.fromkeys(manifest.json_key for manifest in manifests)
    return replace(
        manifests[0],
        **{name: sum(getattr(manifest, name) for manifest in manifests) for name in sums},
        json_key=",".join(keys),
        max_token_id=max(manifest.max_token_id for manifest in manifests),
        sources=tuple(sources),
        skipped=dict(sorted(skipped.items())),
        skipped_examples=tuple(examples[:MAX_SKIPPED_EXAMPLES]),
        unread=dict(sorted(unread.items())),
        unread_examples=tuple(unread_examples[:MAX_SKIPPED_EXAMPLES]),
        shard="",
        shard_of="",
        made=made_now(command, libraries=()),
        subset=names.pop() if len(names) == 1 else None,
        subsets=dict(sorted(subsets.items())),
        encoding_fingerprint=encodings.pop() if len(encodings) == 1 else None,
        bin_sha256=digests[0],
        idx_sha256=digests[1],
        tool_version=__version__,
    )
