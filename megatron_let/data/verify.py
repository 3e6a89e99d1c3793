"""Is a pair of token files whole and what its manifest says? Every entry, every id and both checksums are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_let import __version__
from megatron_let.data.byte_progress import ByteProgress
from megatron_let.data.digests import sha256_of
from megatron_let.data.index_tables import IndexTables, open_tables
from megatron_let.data.indexed import IndexedSummary, check_indexed
from megatron_let.data.manifest import Manifest, manifest_path, require_manifest_of, write_manifest
from megatron_let.data.recorded_tokenizer import difference_from_manifest
from megatron_let.data.table_checks import Check, check_tables
from megatron_let.data.token_scan import Searched, TokenScan, scan_tokens
from megatron_let.data.tokenizers import NO_EOD, Tokenizer
from megatron_let.errors import ConfigError

WriteLine = Callable[[str], None]


@dataclass(frozen=True)
class Expected:
    """What a pair is held against, each as far as it is known."""

    manifest: Manifest | None = None
    tokenizer: Tokenizer | None = None

    @property
    def vocab_size(self) -> int | None:
        """Return the number of ids, the tokenizer's before the manifest's."""
        source = self.tokenizer or self.manifest
        return None if source is None else source.vocab_size

    @property
    def eod(self) -> int | None:
        """Return the id that ends documents, the manifest's before the tokenizer's: it may have been chosen."""
        source = self.manifest or self.tokenizer
        return None if source is None or source.eod == NO_EOD else source.eod


def verify(prefix: str, expected: Expected, write_line: WriteLine) -> Iterator[Check]:
    """Yield the checks of a pair one by one; `write_line` receives progress on large files.

    When the sizes are wrong nothing else can be read and one failed check is all. With damaged tables the ids are
    still looked at, the ends of documents are not.
    """
    try:
        summary = check_indexed(prefix)
        tables = open_tables(prefix)
    except ConfigError as problem:
        yield Check("files", str(problem))
        return
    yield Check(
        "files", note=f"{tables.data_size:,} and {tables.header.index_size:,} bytes, {summary.dtype} ids"
    )
    progress = _progress(tables, write_line)
    of_tables = check_tables(tables, progress)
    yield from of_tables
    are_whole = all(check.problem is None for check in of_tables)
    searched = Searched(expected.vocab_size, expected.eod if are_whole else None)
    scan = scan_tokens(tables, searched, progress)
    yield _check_ids(scan, tables, are_whole=are_whole)
    yield _check_eod(scan, tables, expected)
    manifest = expected.manifest
    if manifest is not None:
        yield _check_manifest(manifest, summary, scan)
        yield _check_sums(manifest, tables, scan, progress)
    if manifest is not None and expected.tokenizer is not None:
        yield _check_tokenizer(manifest, expected.tokenizer)


def add_manifest(prefix: str, tokenizer: Tokenizer, write_line: WriteLine) -> Manifest:
    """Write the manifest of a pair that another program made with `tokenizer`, and return it.

    What nobody knows any more is left empty: sources, bytes of text, JSON key.

    Raises:
        ConfigError: there is a manifest, the pair is damaged, or an id is outside the tokenizer's vocabulary.
    """
    path = manifest_path(prefix)
    if path.exists():
        raise ConfigError(f"{path} is there already; delete it first if it does not belong to these files")
    summary = check_indexed(prefix)
    tables = open_tables(prefix)
    progress = _progress(tables, write_line)
    for check in check_tables(tables, progress):
        if check.problem is not None:
            raise ConfigError(f"{prefix} is damaged: {check.line()}")
    scan = scan_tokens(tables, Searched(tokenizer.vocab_size, tokenizer.eod), progress)
    check = _check_ids(scan, tables, are_whole=True)
    if check.problem is not None:
        raise ConfigError(
            f"{prefix} was not made with tokenizer {tokenizer.name}: {check.problem}; give the tokenizer that made it"
        )
    manifest = replace(
        _manifest_of(tokenizer, summary, scan),
        idx_sha256=sha256_of(f"{prefix}.idx", progress.add),
    )
    write_manifest(prefix, manifest)
    return manifest


def eod_account(scan: TokenScan) -> str:
    """Return how many documents end in eod and how many eods stand elsewhere."""
    inside = scan.eods - scan.ended_documents
    return (
        f"{scan.ended_documents:,} of {scan.filled_documents:,} documents with tokens end in id {scan.searched.eod}, "
        f"which stands {inside:,} times inside documents"
    )


def _manifest_of(tokenizer: Tokenizer, summary: IndexedSummary, scan: TokenScan) -> Manifest:
    is_appended = scan.first_unended is None
    return Manifest(
        tokenizer_type=tokenizer.tokenizer_type,
        tokenizer_name=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=is_appended,
        json_key="",
        dtype=summary.dtype,
        max_token_id=scan.largest,
        documents=summary.documents,
        sequences=summary.sequences,
        tokens=summary.tokens,
        bytes=0,
        sources=(),
        eod_in_text=scan.eods - (scan.ended_documents if is_appended else 0),
        bin_sha256=scan.sha256,
        tool_version=f"{__version__}, added later",
    )


def _progress(tables: IndexTables, write_line: WriteLine) -> ByteProgress:
    # The index is gone through twice: entry by entry, and for its checksum.
    return ByteProgress(tables.data_size + 2 * tables.header.index_size, write_line)


def _check_ids(scan: TokenScan, tables: IndexTables, *, are_whole: bool) -> Check:
    limit = scan.searched.vocab_size
    if scan.outside is not None:
        position, token_id = scan.outside
        where = tables.place_of(position) if are_whole else f"token {position}"
        allowed = "0 and above" if limit is None else f"0 to {limit - 1}"
        return Check("ids", f"id {token_id} at {where}, allowed are {allowed}; the largest is {scan.largest}")
    known = "of an unknown vocabulary" if limit is None else f"of 0 to {limit - 1}"
    return Check("ids", note=f"the largest is {scan.largest} {known}")


def _check_eod(scan: TokenScan, tables: IndexTables, expected: Expected) -> Check:
    if scan.searched.eod is None:
        no_eod = "no tokenizer" if expected.vocab_size is None else "the tokenizer has none"
        return Check("eod", note=f"not looked at: {no_eod if expected.eod is None else 'damaged tables'}")
    is_promised = expected.manifest is not None and expected.manifest.append_eod
    if is_promised and scan.first_unended is not None:
        where = tables.place_of(scan.first_unended)
        return Check("eod", f"the last token at {where} is not id {scan.searched.eod}: {eod_account(scan)}")
    return Check("eod", note=eod_account(scan))


def _check_manifest(manifest: Manifest, summary: IndexedSummary, scan: TokenScan) -> Check:
    try:
        require_manifest_of(manifest, summary)
    except ConfigError as problem:
        return Check("manifest", str(problem))
    if manifest.max_token_id != scan.largest:
        stated = f"it states max_token_id {manifest.max_token_id}, the files have {scan.largest}"
        return Check("manifest", f"{manifest_path(summary.prefix)} belongs to other files: {stated}")
    return Check("manifest", note="its counts are those of the files")


def _check_sums(manifest: Manifest, tables: IndexTables, scan: TokenScan, progress: ByteProgress) -> Check:
    if not manifest.bin_sha256 and not manifest.idx_sha256:
        return Check("checksums", note="not looked at: the manifest has none")
    index_sum = sha256_of(f"{tables.prefix}.idx", progress.add)
    for suffix, stated, found in (
        ("bin", manifest.bin_sha256, scan.sha256),
        ("idx", manifest.idx_sha256, index_sum),
    ):
        if stated and stated != found:
            return Check(
                "checksums",
                f"{tables.prefix}.{suffix} has SHA-256 {found[:12]}..., the manifest {stated[:12]}...",
            )
    return Check("checksums", note=f"SHA-256 {scan.sha256[:12]}... and {index_sum[:12]}...")


def _check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> Check:
    """Compare the tokenizer that was given with the one that made the data."""
    if manifest.tokenizer_fingerprint is None or tokenizer.fingerprint is None:
        return Check("tokenizer", note="not compared: one of the two has no vocabulary")
    difference = difference_from_manifest(tokenizer, manifest)
    if difference:
        return Check("tokenizer", difference)
    unknown = "" if manifest.encoding_fingerprint else "; its vocabulary alone is compared"
    return Check("tokenizer", note=f"the data were made with {tokenizer.name}{unknown}")
