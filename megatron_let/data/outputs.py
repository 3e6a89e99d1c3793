"""What a run of preprocessing writes: a pair for each JSON key (and subset), and the account of every record."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_let import __version__
from megatron_let.data.document_map import DocumentMap
from megatron_let.data.encoding import EncodedBlock, EncodingRules
from megatron_let.data.indexed_writer import IndexedWriter, WriterState
from megatron_let.data.listing import SkippedListing
from megatron_let.data.manifest import MAX_SKIPPED_EXAMPLES, Manifest, SubsetCount, write_manifest
from megatron_let.data.origin import Origin
from megatron_let.data.packing import EncodedPart
from megatron_let.data.records import HARMLESS
from megatron_let.data.subsets import MAX_SUBSETS, pair_name
from megatron_let.data.tokenizers import Tokenizer
from megatron_let.errors import ConfigError
from megatron_let.plain_json import require_fields, shown

# Of fewer records as many may be unusable as of so many: their share says little.
_RECORDS_TO_JUDGE = 10_000
# Of nearly every file system.
_LONGEST_FILE_NAME = 255
# Names beyond these are counted together: a wrong --subset-key may name every record differently.
_MAX_COUNTED_SUBSETS = 1000
_OTHER_SUBSETS = "(others)"
# What is counted of a longer name: a wrong --subset-key may find whole texts.
_COUNTED_NAME = 200


@dataclass(frozen=True)
class ErrorPolicy:
    """When unusable records stop a run."""

    stop_at_first: bool
    max_fraction: float


@dataclass
class Account:
    """Every record under one JSON key: `records` = `documents` + the sum of `skipped`."""

    records: int = 0
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    """The first unusable records: source, record, byte, reason."""
    harmless: list[str] = field(default_factory=list)
    """The first records that had nothing to lose."""

    def add(self, block: EncodedBlock, key: str, policy: ErrorPolicy) -> None:
        """Count a block's records.

        Raises:
            ConfigError: by `policy` the run must not go on.
        """
        skipped = block.skipped[key]
        for item in skipped.first:
            example = f"{block.path}:{item.record} (byte {item.byte}): {item.reason}"
            if item.reason not in HARMLESS and policy.stop_at_first:
                raise ConfigError(f"{example}; --on-error skip counts such records and goes on")
            examples = self.harmless if item.reason in HARMLESS else self.errors
            if len(examples) < MAX_SKIPPED_EXAMPLES:
                examples.append(example)
        self.records += block.num_records
        self.documents += block.num_records - skipped.total
        self.skipped.update(skipped.by_reason)
        if self.records >= _RECORDS_TO_JUDGE:
            self._judge(key, policy)

    def judge_whole(self, key: str, policy: ErrorPolicy) -> None:
        """Raise ConfigError where by `policy` too much of a whole input, however small, is unusable, or most of it is."""
        self._judge(key, policy)
        if self._num_errors() > max(policy.max_fraction, 0.5) * self.records:
            raise self._too_many(key, "more than half")

    @property
    def examples(self) -> list[str]:
        """The first skipped records, those that are errors before all others."""
        return [*self.errors, *self.harmless][:MAX_SKIPPED_EXAMPLES]

    def state(self) -> dict[str, Any]:
        """Return the account in JSON values."""
        return {**vars(self), "skipped": dict(sorted(self.skipped.items()))}

    def _judge(self, key: str, policy: ErrorPolicy) -> None:
        if self._num_errors() > policy.max_fraction * max(self.records, _RECORDS_TO_JUDGE):
            raise self._too_many(key, f"more than --max-error-fraction {policy.max_fraction:g}")

    def _num_errors(self) -> int:
        return sum(count for reason, count in self.skipped.items() if reason not in HARMLESS)

    def _too_many(self, key: str, limit: str) -> ConfigError:
        return ConfigError(
            f'{self._num_errors():,} of {self.records:,} records are unusable under the key "{key}" '
            f"({counts_in_words(self.skipped)}; first: {self.errors[0]}), {limit}: check --json-keys and the input, or "
            "raise --max-error-fraction"
        )


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Return how many records were skipped for each reason."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


@dataclass
class _Pair:
    """One growing pair of files."""

    key: str
    subset: str | None
    name: str
    """What follows the output prefix in its data path."""
    writer: IndexedWriter
    document_map: DocumentMap | None = None
    max_token_id: int = 0
    text_bytes: int = 0
    eod_in_text: int = 0
    subsets: dict[str, SubsetCount] = field(default_factory=dict)

    def add(self, part: EncodedPart, source: int) -> None:
        if self.document_map is not None:
            self.document_map.add(source, part.places)
        self.writer.add_documents(part.tokens, part.lengths, part.sequence_counts)
        self.max_token_id = max(self.max_token_id, part.max_token_id)
        self.text_bytes += part.text_bytes
        self.eod_in_text += part.eod_in_text
        for full_name, count in part.subset_counts.items():
            name = full_name[:_COUNTED_NAME]
            is_new = name not in self.subsets and len(self.subsets) >= _MAX_COUNTED_SUBSETS
            counted = _OTHER_SUBSETS if is_new else name
            self.subsets[counted] = self.subsets.get(counted, SubsetCount()) + count

    def state(self) -> dict[str, Any]:
        """Bring the pair to the disk and return what is there."""
        return {
            "key": self.key,
            "subset": self.subset,
            "name": self.name,
            "max_token_id": self.max_token_id,
            "text_bytes": self.text_bytes,
            "eod_in_text": self.eod_in_text,
            "subsets": {name: asdict(count) for name, count in self.subsets.items()},
            "writer": asdict(self.writer.sync()),
            **({} if self.document_map is None else {"map": self.document_map.sync()}),
        }


@dataclass(frozen=True)
class _SavedPair:
    """What `_Pair.state` returns."""

    key: str
    subset: str | None
    name: str
    max_token_id: int
    text_bytes: int
    eod_in_text: int
    subsets: dict[str, Any]
    writer: dict[str, Any]


class Outputs:
    """All pairs of a run, by JSON key and subset, in the order in which they appeared."""

    def __init__(self, directory: Path, prefix: str, rules: EncodingRules) -> None:
        """Make ready to write.

        Raises:
            ConfigError: no pair could be put under its name in the end.
        """
        self._directory = directory
        self._prefix = prefix
        self._rules = rules
        self._pairs: dict[tuple[str, str | None], _Pair] = {}
        self.accounts = {key: Account() for key in rules.json_keys}
        self.listing = SkippedListing(directory, rules.json_keys) if rules.list_skipped else None
        for key in () if rules.split_by_subset else rules.json_keys:
            _require_usable(f"{prefix}{_whole_name(key)}")

    def add(self, block: EncodedBlock, policy: ErrorPolicy, source: int) -> None:
        """Append a block's documents and count its records; `source` is the place of its file among the sources.

        Raises:
            ConfigError: by `policy` the run must not go on, or there are too many subsets.
        """
        for key, account in self.accounts.items():
            if self.listing is not None:
                self.listing.add(key, block.path, block.skipped[key].listed)
            account.add(block, key, policy)
        for part in block.parts:
            self._pair_of(part.key, part.subset).add(part, source)

    def state(self) -> dict[str, Any]:
        """Bring everything to the disk and return it in JSON values."""
        return {
            "pairs": [pair.state() for pair in self._pairs.values()],
            "accounts": {key: account.state() for key, account in self.accounts.items()},
            **({} if self.listing is None else {"listing": self.listing.sync()}),
        }

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned to a run that was stopped.

        Raises:
            ConfigError: the files do not hold what it says.
            ValueError, KeyError, TypeError: it is nothing that `state` returns.
        """
        if state["accounts"].keys() != self.accounts.keys():
            raise ValueError("accounts of other keys")
        for noted in state["pairs"]:
            saved = dict(noted)
            map_state = saved.pop("map") if self._rules.map_documents else None
            require_fields(_SavedPair, saved)
            key, subset = saved["key"], saved["subset"]
            if key not in self.accounts or (key, subset) in self._pairs:
                raise ValueError(f"a pair of the key {shown(key)}")
            if saved["name"] != self._name_of(key, subset):
                raise ValueError(f"{shown(saved['name'])} as the name of a pair")
            for count in saved["subsets"].values():
                require_fields(SubsetCount, count)
            require_fields(WriterState, saved["writer"])
            counts = {name: SubsetCount(**count) for name, count in saved["subsets"].items()}
            writer = IndexedWriter(
                self._stem(len(self._pairs)), self._rules.dtype, WriterState(**saved["writer"])
            )
            values = {**saved, "subsets": counts, "writer": writer}
            pair = self._pairs[key, subset] = _Pair(**values)
            if map_state is not None:
                pair.document_map = DocumentMap(writer.stem, map_state)
        if self.listing is not None:
            self.listing.take_up(state["listing"])
        for key, saved in state["accounts"].items():
            require_fields(Account, saved)
            self.accounts[key] = Account(**{**saved, "skipped": Counter(saved["skipped"])})

    def judge_whole(self, policy: ErrorPolicy) -> None:
        """Raise ConfigError when a key has no document at all, or by `policy` too few."""
        for key, account in self.accounts.items():
            if account.documents == 0:
                first = f"; first: {account.examples[0]}" if account.examples else ""
                raise ConfigError(
                    f'no document has text under the key "{key}" ({counts_in_words(account.skipped)}{first}): check '
                    "--json-keys and --input"
                )
            account.judge_whole(key, policy)

    def complete(self, tokenizer: Tokenizer, origin: Origin) -> list[tuple[Path, str, Manifest]]:
        """Finish every pair under its working name; return that, what follows the output prefix, and the manifest."""
        done: list[tuple[Path, str, Manifest]] = []
        for pair in self._pairs.values():
            manifest = self._manifest_of(pair, tokenizer, origin)
            if pair.document_map is not None:
                pair.document_map.complete()
            write_manifest(str(pair.writer.stem), manifest)
            done.append((pair.writer.stem, pair.name, manifest))
        return done

    @property
    def num_records(self) -> int:
        """Return how many records have been read."""
        return next(iter(self.accounts.values())).records

    def close(self) -> None:
        """Close all files."""
        for pair in self._pairs.values():
            pair.writer.close()
            if pair.document_map is not None:
                pair.document_map.close()
        if self.listing is not None:
            self.listing.close()

    def _pair_of(self, key: str, subset: str | None) -> _Pair:
        pair = self._pairs.get((key, subset))
        if pair is None:
            pair = self._pairs[key, subset] = self._new_pair(key, subset)
        return pair

    def _new_pair(self, key: str, subset: str | None) -> _Pair:
        if len({name for _, name in self._pairs} | {subset}) > MAX_SUBSETS:
            raise ConfigError(
                f"more than {MAX_SUBSETS} subsets under {self._rules.subset_key}, {subset!r} the latest: "
                "--split-by-subset writes a pair for each; check --subset-key"
            )
        name = self._name_of(key, subset)
        _require_usable(f"{self._prefix}{name}")
        stem = self._stem(len(self._pairs))
        writer = IndexedWriter(stem, self._rules.dtype)
        return _Pair(key, subset, name, writer, DocumentMap(stem) if self._rules.map_documents else None)

    def _name_of(self, key: str, subset: str | None) -> str:
        """Return what follows the output prefix in the name of the next pair."""
        taken = [pair.name for pair in self._pairs.values()]
        return _whole_name(key) if subset is None else pair_name(subset, key, taken)

    def _stem(self, index: int) -> Path:
        return self._directory / f"{index:04d}"

    def _manifest_of(self, pair: _Pair, tokenizer: Tokenizer, origin: Origin) -> Manifest:
        account, writer = self.accounts[pair.key], pair.writer
        bin_sha256, idx_sha256 = writer.complete()
        is_whole = pair.subset is None  # else the skipped records belong to no single pair
        return Manifest(
            tokenizer_type=tokenizer.tokenizer_type,
            tokenizer_name=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            encoding_fingerprint=tokenizer.encoding_fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            append_eod=self._rules.append_eod,
            json_key=pair.key,
            dtype=self._rules.dtype,
            max_token_id=pair.max_token_id,
            documents=writer.documents,
            sequences=writer.sequences,
            tokens=writer.tokens,
            bytes=pair.text_bytes,
            sources=tuple(origin.sources),
            unread=origin.unread_counts,
            unread_examples=origin.unread_examples,
            made=origin.made,
            shard=origin.shard,
            shard_of=origin.shard_of,
            skipped=dict(sorted(account.skipped.items())) if is_whole else {},
            skipped_examples=tuple(account.examples) if is_whole else (),
            records=account.records if is_whole else writer.documents,
            subset=pair.subset,
            subsets=dict(sorted(pair.subsets.items())),
            eod_in_text=pair.eod_in_text,
            bin_sha256=bin_sha256,
            idx_sha256=idx_sha256,
            tool_version=__version__,
        )


def _whole_name(key: str) -> str:
    return f"_{key}_document"


def _require_usable(prefix: str) -> None:
    """Raise ConfigError when the files of a pair could not be put under this name: better now than after hours."""
    for kind in ("bin", "idx", "manifest.json"):
        path = Path(f"{prefix}.{kind}")
        if len(os.fsencode(path.name)) > _LONGEST_FILE_NAME:
            raise ConfigError(
                f"{path.name} is longer than a file's name can be: give a shorter --output-prefix"
            )
        if path.is_dir():
            raise ConfigError(f"{path} is a directory: give another --output-prefix")
