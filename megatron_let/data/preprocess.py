"""Raw text to indexed token files: read, encode in workers, write in order, account for every record.

A run keeps a journal (journal.py): killed at any moment and started again with the same arguments it goes on from its
last chunk, and the files are those of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from megatron_let import __version__
from megatron_let.data.batch_encoders import BatchEncoder
from megatron_let.data.blocks import Block
from megatron_let.data.encoding import EncodedBlock, EncodingRules, encode_block
from megatron_let.data.fast_encoder import choose_encoder
from megatron_let.data.indexed import dtype_for_vocabulary
from megatron_let.data.indexed_writer import install_pair
from megatron_let.data.input_rules import InputRules
from megatron_let.data.journal import Journal, WorkingDirectory, changed_arguments, write_synced
from megatron_let.data.manifest import Manifest, read_manifest
from megatron_let.data.outputs import ErrorPolicy, Outputs, counts_in_words
from megatron_let.data.progress import ProgressMeter
from megatron_let.data.readers import read_blocks
from megatron_let.data.reading import Reading
from megatron_let.data.records import RejectedRecord, records_of, utf8_size
from megatron_let.data.sources import find_sources
from megatron_let.data.subsets import blend_line, subset_report
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.data.workers import map_in_order
from megatron_let.errors import ConfigError, LetError

# What the fast encoder is tried on before the run: the first texts of so many sources, so much of each.
_SAMPLED_SOURCES = 8
_SAMPLED_CHARACTERS = 1 << 16


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


@dataclass(frozen=True)
class _BlockEncoder:
    """encode_block with all but the block given: what a worker process receives once."""

    rules: EncodingRules
    encoder: BatchEncoder

    def __call__(self, block: Block) -> EncodedBlock:
        return encode_block(block, self.rules, self.encoder)


def preprocess(
    settings: PreprocessSettings, tokenizer: Tokenizer, write_line: Callable[[str], None]
) -> dict[str, Manifest]:
    """Write a pair of files and its manifest for each JSON key (and subset); return the manifests by data path.

    The bytes do not depend on the number of workers, nor on how often the run was killed. `write_line` receives
    progress lines.

    Raises:
        ConfigError: an impossible setting, an unreadable or changed input, too many unusable records, an unwritable
            output, a key without any document.
        LetError: a worker died, or the disk is full.
    In every such case the files that were there before are left as they were.
    """
    _check_settings(settings)
    with WorkingDirectory(settings.output_prefix) as directory:
        try:
            journal = None if settings.restart else directory.read_journal()
            if journal is None:
                directory.clear()
            if journal is None or not journal.installing:
                journal = _Run(settings, tokenizer, directory, write_line).complete(journal)
                directory.write_journal(journal)
            else:
                _require_same(journal, _arguments(settings, tokenizer))
            return _install(directory, journal)
        except OSError as error:
            raise LetError(
                f"cannot write {settings.output_prefix}: {error.strerror}; nothing was written over, and the same "
                "command goes on where this one stopped"
            ) from error


class _Run:
    """One run, from its first block or from where a stopped one left off, to complete pairs."""

    def __init__(
        self,
        settings: PreprocessSettings,
        tokenizer: Tokenizer,
        directory: WorkingDirectory,
        write_line: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._directory = directory
        self._write_line = write_line
        self._arguments = _arguments(settings, tokenizer)
        self._rules = EncodingRules(
            json_keys=settings.json_keys,
            dtype=dtype_for_vocabulary(tokenizer.vocab_size),
            append_eod=settings.append_eod,
            eod=tokenizer.eod,
            subset_key=settings.subset_key,
            split_by_subset=settings.split_by_subset,
            replace_invalid_utf8=settings.invalid_utf8 == "replace",
        )
        self._input_rules = InputRules(
            input_format=settings.input_format,
            text_documents=settings.text_documents,
            columns=tuple(dict.fromkeys([*settings.json_keys, settings.subset_key.split(".")[0]])),
            max_document_bytes=settings.max_document_bytes,
            block_bytes=settings.block_bytes,
        )
        self._reading = Reading(find_sources(settings.inputs, self._input_rules))
        self._outputs = Outputs(directory.path, self._rules)

    def complete(self, journal: Journal | None) -> Journal:
        """Encode everything that is left and return the journal of a run whose pairs are complete."""
        try:
            if journal is not None:
                self._take_up(journal)
            self._encode_all()
            sources = self._reading.finished
            done = self._outputs.complete(self._settings.output_prefix, self._tokenizer, sources)
            pairs = [[stem.name, prefix] for prefix, (stem, _) in done.items()]
            manifests = {prefix: manifest for prefix, (_, manifest) in done.items()}
            files = self._write_subset_files(manifests) if self._settings.split_by_subset else []
            return Journal(self._arguments, {"pairs": pairs, "files": files}, installing=True)
        finally:
            self._outputs.close()

    def _take_up(self, journal: Journal) -> None:
        _require_same(journal, self._arguments)
        self._reading.take_up(journal.progress["reading"])
        self._outputs.take_up(journal.progress["outputs"])
        self._write_line(f"going on after {self._reading.disk_bytes / 1e6:,.1f} MB of input")

    def _encode_all(self) -> None:
        settings, outputs, reading = self._settings, self._outputs, self._reading
        policy = ErrorPolicy(settings.on_error == "stop", settings.max_error_fraction)
        meter = ProgressMeter(
            reading.total_bytes, settings.log_interval, self._write_line, read_before=reading.disk_bytes
        )
        blocks = reading.blocks(self._input_rules)
        first = next(blocks, None)
        encode = _BlockEncoder(self._rules, self._choose_encoder(first))
        committed = time.monotonic()
        for block in map_in_order(
            encode, chain([first] if first else [], blocks), settings.workers, size_of=_size_of
        ):
            outputs.add(block, policy)
            reading.advance(block)
            meter.add(
                documents=block.num_records,
                tokens=sum(part.num_tokens for part in block.parts),
                content_bytes=block.num_bytes,
                read_bytes=reading.disk_bytes,
            )
            if time.monotonic() - committed >= settings.commit_seconds:
                self._commit()
                committed = time.monotonic()
        self._write_line(meter.line())

    def _commit(self) -> None:
        """Note in the journal what is written, once it is on the disk."""
        progress = {"outputs": self._outputs.state(), "reading": self._reading.state()}
        self._directory.write_journal(Journal(self._arguments, progress))

    def _choose_encoder(self, first: Block | None) -> BatchEncoder:
        """Take the fastest encoder that gives the tokenizer's very ids on the first texts of several sources."""
        sample = _sample_of(first, self._rules) if first else []
        for source in self._reading.sources[len(self._reading.finished) + 1 :][: _SAMPLED_SOURCES - 1]:
            if (
                source.size is not None and not source.is_parquet
            ):  # parquet is read whole before its first block
                sample += _sample_of(next(read_blocks(source, self._input_rules)), self._rules)
        encoder, line = choose_encoder(self._tokenizer.batch_encoder(), sample, self._settings.encoder)
        self._write_line(line)
        return encoder

    def _write_subset_files(self, manifests: Mapping[str, Manifest]) -> list[list[str]]:
        """Write the blend and the account of a run by subset under working names; return those and the final names."""
        files: list[list[str]] = []
        for key, account in self._outputs.accounts.items():
            own = {prefix: manifest for prefix, manifest in manifests.items() if manifest.json_key == key}
            line = blend_line(own, self._settings.subset_weights)
            report = json.dumps(subset_report(account.state(), own, line), indent=2)
            for name, text in ((f"{key}_subsets.json", report), (f"{key}_blend.txt", line)):
                write_synced(self._directory.path / name, f"{text}\n")
                files.append([name, f"{self._settings.output_prefix}_{name}"])
        return files


def _sample_of(block: Block, rules: EncodingRules) -> list[str]:
    """Return the beginning of the usable texts of a block."""
    found: list[str] = []
    left = _SAMPLED_CHARACTERS
    for record in records_of(block, text_key=rules.json_keys[0]):
        for key in rules.json_keys:
            with suppress(RejectedRecord):
                texts = [text[:left] for text in record.take_texts(key)]
                utf8_size(texts)
                found += texts
                left -= sum(map(len, texts))
        if left <= 0:
            break
    return found


def _install(directory: WorkingDirectory, journal: Journal) -> dict[str, Manifest]:
    """Put complete pairs under their names, those that a killed run did not get to as well."""
    for stem, prefix in journal.progress["pairs"]:
        install_pair(directory.path / stem, prefix)
    for name, final in journal.progress["files"]:
        if (directory.path / name).exists():
            (directory.path / name).replace(final)
    manifests = {prefix: read_manifest(prefix) for _, prefix in journal.progress["pairs"]}
    directory.remove()
    return {prefix: manifest for prefix, manifest in manifests.items() if manifest is not None}


def _size_of(block: Block) -> int:
    return len(block.content)


def _arguments(settings: PreprocessSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what decides over the bytes, in JSON values: a stopped run with others cannot go on."""
    return {
        "--input": list(settings.inputs),
        "--json-keys": list(settings.json_keys),
        "--append-eod": settings.append_eod,
        "--input-format": settings.input_format,
        "--text-documents": settings.text_documents,
        "--subset-key": settings.subset_key,
        "--split-by-subset": settings.split_by_subset,
        "--subset-weights": dict(settings.subset_weights),
        "--max-document-bytes": settings.max_document_bytes,
        "--invalid-utf8": settings.invalid_utf8,
        "the tokenizer": hashlib.sha256(tokenizer.batch_encoder().definition()).hexdigest(),
        "the version of megatron_let": __version__,
    }


def _require_same(journal: Journal, arguments: Mapping[str, Any]) -> None:
    if changes := changed_arguments(arguments, journal.arguments):
        raise ConfigError(
            f"a stopped run lies under this --output-prefix, with other arguments ({changes}): give the same to go "
            "on, or --restart to begin anew"
        )


def _check_settings(settings: PreprocessSettings) -> None:
    keys = settings.json_keys
    if not keys or len(set(keys)) != len(keys):
        raise ConfigError(f"--json-keys {' '.join(keys)}: each key once, and at least one")
    if settings.workers < 1 or settings.log_interval < 1:
        raise ConfigError(
            f"--workers {settings.workers} and --log-interval {settings.log_interval} must be at least 1"
        )
    if settings.max_document_bytes < 1:
        raise ConfigError(f"--max-document-bytes {settings.max_document_bytes} must be at least 1")
    if not 0 <= settings.max_error_fraction <= 1:
        raise ConfigError(f"--max-error-fraction {settings.max_error_fraction} must be between 0 and 1")
    if settings.subset_weights and not settings.split_by_subset:
        raise ConfigError("--subset-weights needs --split-by-subset")


def describe(manifest: Manifest, prefix: str) -> str:
    """Return what was written and skipped, in one line."""
    num_skipped = sum(manifest.skipped.values())
    line = f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})"
    if not num_skipped:
        return f"{line}, nothing skipped"
    return f"{line}, {num_skipped:,} records skipped: {counts_in_words(manifest.skipped)}"
