"""Raw text to indexed token files: read, encode in workers, write in order, account for every record.

A run keeps a journal (journal.py): killed at any moment and started again with the same arguments it goes on from its
last chunk, and the files are those of a run that was never killed.
"""

from __future__ import annotations

import errno
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron_let.data.batch_encoders import BatchEncoder
from megatron_let.data.blocks import Block, first_records
from megatron_let.data.continuing import arguments_of, install, require_installable, require_same
from megatron_let.data.encoding import EncodedBlock, EncodingRules, encode_block
from megatron_let.data.fast_encoder import choose_encoder
from megatron_let.data.indexed import dtype_for_vocabulary
from megatron_let.data.input_rules import InputRules
from megatron_let.data.journal import Journal, WorkingDirectory, write_synced
from megatron_let.data.manifest import Manifest
from megatron_let.data.origin import Origin, made_now
from megatron_let.data.outputs import ErrorPolicy, Outputs, counts_in_words
from megatron_let.data.preprocess_settings import PreprocessSettings, check_settings
from megatron_let.data.progress import ProgressMeter
from megatron_let.data.readers import read_blocks
from megatron_let.data.reading import Reading, require_unchanged
from megatron_let.data.records import EXCLUDED_SUBSET, RejectedRecord, records_of, utf8_size
from megatron_let.data.sharding import identity_of, sources_of_shard
from megatron_let.data.sources import find_inputs
from megatron_let.data.subsets import MAX_SUBSETS, blend_words, subset_report
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.data.workers import map_in_order
from megatron_let.errors import LetError

# What the fast encoder is tried on before the run: the first texts of so many sources, so much of each.
_SAMPLED_SOURCES = 8
_SAMPLED_CHARACTERS = 1 << 16
# Tokens, lengths, bounds and the document map.
_FILES_OF_A_PAIR = 4
# Open files beside those of the pairs: libraries, pipes to workers, inputs.
_OTHER_FILES = 512


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
    In every such case the files that were there before are left as they were, but for a failure while finished files
    are put under their names.
    """
    check_settings(settings)
    arguments = arguments_of(settings, tokenizer)
    with WorkingDirectory(settings.output_prefix, settings.inputs) as directory:
        journal = None if settings.restart else directory.read_journal()
        if journal is not None:
            require_same(journal, arguments, directory.path)
        if journal is None or not journal.installing:
            run = _Run(settings, tokenizer, directory, write_line)
            journal = Journal(arguments, run.complete(journal, arguments), installing=True)
            with _writing(directory, settings.output_prefix):
                directory.write_journal(journal)
        else:
            with directory.taking_up():
                require_installable(journal.progress)
                require_unchanged(journal.progress["reading"])
        return install(directory, journal, settings.output_prefix, write_line)


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
        self._rules = EncodingRules(
            json_keys=settings.json_keys,
            dtype=dtype_for_vocabulary(tokenizer.vocab_size),
            append_eod=settings.append_eod,
            eod=tokenizer.eod,
            subset_key=settings.subset_key,
            split_by_subset=settings.split_by_subset,
            replace_invalid_utf8=settings.invalid_utf8 == "replace",
            excluded_subsets=settings.excluded_subsets,
            list_skipped=settings.list_skipped,
            map_documents=settings.map_documents,
        )
        self._input_rules = InputRules(
            input_format=settings.input_format,
            text_documents=settings.text_documents,
            columns=tuple(dict.fromkeys([*settings.json_keys, settings.subset_key.split(".")[0]])),
            max_document_bytes=settings.max_document_bytes,
            block_bytes=settings.block_bytes,
        )
        self._outputs = Outputs(directory.path, settings.output_prefix, self._rules)
        found = find_inputs(settings.inputs, self._input_rules)
        self._found, shard = found, settings.shard
        self._reading = Reading(sources_of_shard(found.sources, shard) if shard else found.sources)
        self._policy = ErrorPolicy(settings.on_error == "stop", settings.max_error_fraction)
        self._encoder_note = ""
        directory.refuse_inputs([source.path for source in self._reading.sources])

    def complete(self, journal: Journal | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Encode everything that is left; return how the complete pairs are to be put under their names."""
        try:
            if self._settings.split_by_subset:
                _allow_open_files(
                    _FILES_OF_A_PAIR * MAX_SUBSETS * len(self._settings.json_keys) + _OTHER_FILES
                )
            if journal is None:
                self._directory.clear()
            else:
                self._take_up(journal)
            self._encode_all(arguments)
            self._outputs.judge_whole(self._policy)
            with self._writing():
                self._commit(arguments)
                done = self._outputs.complete(self._tokenizer, self._origin())
                prefix = self._settings.output_prefix
                manifests = {f"{prefix}{name}": manifest for _, name, manifest in done}
                return {
                    "pairs": [[stem.name, name] for stem, name, _ in done],
                    "files": self._write_subset_files(manifests) + self._listings(),
                    "reading": self._reading.state(),
                }
        finally:
            self._outputs.close()

    def _take_up(self, journal: Journal) -> None:
        with self._directory.taking_up():
            self._reading.take_up(journal.progress["reading"])
        self._write_line(
            f"going on after {self._reading.disk_bytes / 1e6:,.1f} MB of input, once it is checked"
        )
        with self._directory.taking_up():
            self._outputs.take_up(journal.progress["outputs"])

    def _encode_all(self, arguments: Mapping[str, Any]) -> None:
        settings, outputs, reading = self._settings, self._outputs, self._reading
        blocks = reading.blocks(self._input_rules)
        if settings.limit is not None:
            blocks = first_records(blocks, settings.limit - outputs.num_records)
        first = next(blocks, None)
        encode = _BlockEncoder(self._rules, self._choose_encoder(first))
        meter = ProgressMeter(
            reading.total_bytes,
            settings.log_interval,
            self._write_line,
            read_before=reading.disk_bytes,
            documents_before=outputs.num_records,
        )
        committed = time.monotonic()
        items = chain(iter([first] if first else []), blocks)
        del first  # it may be a document of 128 MiB
        for block in map_in_order(encode, items, settings.workers, size_of=_size_of):
            with self._writing():
                outputs.add(block, self._policy, len(reading.finished))
                reading.advance(block)
                if time.monotonic() - committed >= settings.commit_seconds:
                    self._commit(arguments)
                    committed = time.monotonic()
            meter.add(
                documents=block.num_records,
                tokens=sum(part.num_tokens for part in block.parts),
                content_bytes=block.num_bytes,
                read_bytes=reading.disk_bytes,
            )
        self._write_line(meter.line())
        self._tell_of_choices()

    def _writing(self) -> AbstractContextManager[None]:
        return _writing(self._directory, self._settings.output_prefix)

    def _commit(self, arguments: Mapping[str, Any]) -> None:
        """Note in the journal what is written, once it is on the disk."""
        progress = {"outputs": self._outputs.state(), "reading": self._reading.state()}
        self._directory.write_journal(Journal(arguments, progress))

    def _choose_encoder(self, first: Block | None) -> BatchEncoder:
        """Take the fastest encoder that gives the tokenizer's very ids on the first texts of several sources."""
        sample = _sample_of(first, self._rules) if first else []
        later = self._reading.sources[len(self._reading.finished) + 1 :]
        # A parquet file is read whole, for its digest, before its first block; standard input is read once.
        cheap = [source for source in later if source.size is not None and not source.is_parquet]
        for source in cheap[: _SAMPLED_SOURCES - 1]:
            sample += _sample_of(next(read_blocks(source, self._input_rules)), self._rules)
        encoder, line = choose_encoder(self._tokenizer.batch_encoder(), sample, self._settings.encoder)
        self._write_line(line)
        self._encoder_note = line.removeprefix("encoder: ")
        return encoder

    def _origin(self) -> Origin:
        settings, found = self._settings, self._found
        made = made_now(settings.command, self._encoder_note)
        if settings.shard is None:
            return Origin(self._reading.read, found.unread, made)
        identity = identity_of(found.sources)
        return Origin(self._reading.read, found.unread, made, str(settings.shard), identity)

    def _listings(self) -> list[list[str]]:
        return [] if self._outputs.listing is None else self._outputs.listing.finished()

    def _tell_of_choices(self) -> None:
        """Say what --limit left unread, and that --exclude-subset names nothing that is there."""
        settings, reading = self._settings, self._reading
        if settings.limit is not None and len(reading.finished) < len(reading.sources):
            self._write_line(
                f"--limit: {self._outputs.num_records:,} records are read, {len(reading.finished):,} of "
                f"{len(reading.sources):,} files to the end"
            )
        account = next(iter(self._outputs.accounts.values()))
        if settings.excluded_subsets and not account.skipped[EXCLUDED_SUBSET]:
            self._write_line(
                f"--exclude-subset: no record is of {', '.join(settings.excluded_subsets)} (--subset-key "
                f"{settings.subset_key} says where a record names its subset)"
            )

    def _write_subset_files(self, manifests: Mapping[str, Manifest]) -> list[list[str]]:
        """Write the blend and the account of a run by subset under working names; return those and the final suffixes."""
        files: list[list[str]] = []
        for key, account in self._outputs.accounts.items() if self._settings.split_by_subset else ():
            own = {prefix: manifest for prefix, manifest in manifests.items() if manifest.json_key == key}
            words = blend_words(own, self._settings.subset_weights)
            report = json.dumps(subset_report(account.state(), own, words), indent=2)
            for kind, text in (("subsets.json", report), ("blend.txt", " ".join(words))):
                name = f"{len(files):04d}.{kind}"
                write_synced(self._directory.path / name, f"{text}\n")
                files.append([name, f"_{key}_{kind}"])
            for prefix in sorted(set(own) - set(words)):
                self._write_line(f"--subset-weights leaves {prefix} out of the blend")
        return files


def _sample_of(block: Block, rules: EncodingRules) -> list[str]:
    """Return the beginning of the usable texts of a block."""
    found: list[str] = []
    left = _SAMPLED_CHARACTERS
    for record in records_of(block, text_key=rules.json_keys[0]):
        for key in rules.json_keys:
            with suppress(RejectedRecord):
                texts = [text[:left] for text in record.take_long_texts(key)]
                utf8_size(texts)
                found += texts
                left -= sum(map(len, texts))
        if left <= 0:
            break
    return found


def _size_of(block: Block) -> int:
    return len(block.content)


def _allow_open_files(count: int) -> None:
    """Raise this process's own limit of open files to `count`, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


@contextmanager
def _writing(directory: WorkingDirectory, prefix: str) -> Iterator[None]:
    """Say what became of the files when they cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise LetError(
                "a pair for each subset needs three open files (four with --document-map), more than the "
                "system allows: raise `ulimit -n`"
            ) from error
        rest = "; the same command goes on where this one stopped" if directory.has_journal else ""
        raise LetError(f"cannot write {prefix}: {error.strerror}; nothing was written over{rest}") from error


def describe(manifest: Manifest, prefix: str) -> str:
    """Return what was written and skipped, in one line."""
    num_skipped, num_unread = sum(manifest.skipped.values()), sum(manifest.unread.values())
    line = f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype})"
    skipped = f"{num_skipped:,} records skipped: {counts_in_words(manifest.skipped)}"
    unread = f"; {num_unread:,} files not read: {counts_in_words(manifest.unread)}" if num_unread else ""
    return f"{line}, {skipped if num_skipped else 'nothing skipped'}{unread}"
