"""Look into a pair of token files: count, check everything, read a document back, add a manifest.

    python tools/inspect_data.py data/pile_text_document                 # counts, lengths of documents, manifest
    python tools/inspect_data.py data/pile_text_document --document 0    # ids and text of one document
    python tools/inspect_data.py data/pile_text_document --verify        # every entry, every id, both checksums
    python tools/inspect_data.py data/of_megatron --add-manifest --tokenizer-model tokenizers/smollm

The tokenizer is the one that the manifest names, unless `--tokenizer-model` gives another. Files of Megatron-LM and
GPT-NeoX have no manifest; `--add-manifest` checks them against a tokenizer and writes one, which training then uses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.document_map import map_path, open_map
from megatron_let.data.index_tables import open_tables
from megatron_let.data.indexed import check_indexed, read_document
from megatron_let.data.manifest import Manifest, manifest_path, read_manifest, require_manifest_of
from megatron_let.data.outputs import counts_in_words
from megatron_let.data.program import ProgramParser, run_program, say
from megatron_let.data.statistics import length_statistics
from megatron_let.data.tokenizer_flags import add_tokenizer_places, given_places, refuse_without_effect
from megatron_let.data.tokenizers import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from megatron_let.data.verify import Expected, add_manifest, verify
from megatron_let.errors import ConfigError

_SHOWN_IDS = 20
_DEFAULT_TYPE = "HuggingFaceTokenizer"


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines to print. Raises ConfigError."""
    return verified(arguments) if arguments.verify else report(arguments)


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines to print. Raises ConfigError for a damaged pair or a missing tokenizer."""
    prefix: str = arguments.prefix
    if arguments.add_manifest:
        yield from _added(prefix, _given_tokenizer(arguments))
        return
    summary = check_indexed(prefix)
    manifest = read_manifest(prefix)
    yield (
        f"{prefix}: {summary.documents:,} documents, {summary.sequences:,} sequences, {summary.tokens:,} tokens, "
        f"{summary.tokens / summary.documents:,.1f} tokens a document, {summary.dtype}"
    )
    if manifest is not None:
        require_manifest_of(manifest, summary)
    if arguments.document is not None:
        yield from _document(arguments, manifest)
        return
    yield from length_statistics(open_tables(prefix)).lines()
    yield from _about(manifest)


def verified(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each check. Raises ConfigError at the end when one has failed."""
    prefix: str = arguments.prefix
    expected = Expected(
        manifest=read_manifest(prefix),
        tokenizer=_given_tokenizer(arguments) if _is_tokenizer_given(arguments) else None,
    )
    failed, count = [], 0
    for check in verify(prefix, expected, say):
        yield check.line()
        count += 1
        failed += [check.name] if check.problem is not None else []
    if failed:
        raise ConfigError(f"{prefix} failed {len(failed)} of {count} checks: {', '.join(failed)}")


def _added(prefix: str, tokenizer: Tokenizer) -> Iterator[str]:
    manifest = add_manifest(prefix, tokenizer, say)
    ends = "every document ends in eod" if manifest.append_eod else "not every document ends in eod"
    yield f"{manifest_path(prefix)} written"
    yield (
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, largest id {manifest.max_token_id} of "
        f"{manifest.vocab_size} in {tokenizer.name}; {ends} ({manifest.eod})"
    )


def _about(manifest: Manifest | None) -> Iterator[str]:
    """Yield what the manifest tells that the files do not."""
    if manifest is None:
        yield "no manifest: the tokenizer is unknown (--add-manifest writes one)"
        return
    yield (
        f"tokenizer: {manifest.tokenizer_type} {manifest.tokenizer_name}, {manifest.vocab_size:,} ids, eod "
        f"{manifest.eod} {'appended' if manifest.append_eod else 'not appended'}"
    )
    yield f"tokenizer fingerprint: {manifest.tokenizer_fingerprint}"
    yield f"encoding fingerprint: {manifest.encoding_fingerprint}"
    yield f"largest token id: {manifest.max_token_id}"
    if manifest.records:
        yield f"records read: {manifest.records:,}"
    yield f"records skipped: {sum(manifest.skipped.values()):,}"
    yield from (f"  {reason}: {count:,}" for reason, count in sorted(manifest.skipped.items()))
    if manifest.unread:
        yield f"files not read: {counts_in_words(manifest.unread)}"
    if manifest.made:
        yield f"made: {', '.join(f'{name} {value}' for name, value in manifest.made.items())}"
    if manifest.subset is not None:
        yield f"subset: {manifest.subset}"
    if manifest.subsets:
        yield "subsets:"
    for name, held in sorted(manifest.subsets.items()):
        yield (
            f"  {name or '(none)'}: {held.documents:,} documents, {held.tokens:,} tokens, {held.bytes:,} bytes of text"
        )


def _document(arguments: argparse.Namespace, manifest: Manifest | None) -> Iterator[str]:
    ids = read_document(arguments.prefix, arguments.document).tolist()
    rows = open_map(arguments.prefix, check_indexed(arguments.prefix).documents)
    if rows is not None and manifest is not None:
        source, record, byte = rows[arguments.document].tolist()
        if not 0 <= source < len(manifest.sources):
            raise ConfigError(
                f"{map_path(arguments.prefix)} names source {source} of {len(manifest.sources)}: delete it"
            )
        yield f"from {manifest.sources[source].path}, record {record:,} (byte {byte:,})"
    shown = " ".join(map(str, ids[:_SHOWN_IDS])) + (" ..." if len(ids) > _SHOWN_IDS else "")
    yield f"document {arguments.document}: {len(ids):,} tokens: {shown}"
    yield _tokenizer_of(arguments, manifest).detokenize(ids)


def _tokenizer_of(arguments: argparse.Namespace, manifest: Manifest | None) -> Tokenizer:
    if _is_tokenizer_given(arguments):
        return _given_tokenizer(arguments)
    if manifest is None:
        raise ConfigError("--document needs --tokenizer-model (and --tokenizer-type): there is no manifest")
    if manifest.tokenizer_type == "GPT2BPETokenizer":
        raise ConfigError(
            f"--document needs --tokenizer-type {manifest.tokenizer_type} --vocab-file and --merge-file: the manifest "
            f"names {manifest.tokenizer_name} alone"
        )
    return build_tokenizer(
        tokenizer_type=manifest.tokenizer_type,
        tokenizer_model=manifest.tokenizer_name,
        vocab_size=manifest.vocab_size - 1,
        needs_eod=False,
    )


def _is_tokenizer_given(arguments: argparse.Namespace) -> bool:
    return arguments.tokenizer_model is not None or arguments.tokenizer_type is not None


def _given_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    return build_tokenizer(
        tokenizer_type=arguments.tokenizer_type or _DEFAULT_TYPE,
        tokenizer_model=arguments.tokenizer_model,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
        vocab_size=arguments.vocab_size,
        needs_eod=arguments.document is None,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ProgramParser(__doc__)
    parser.add_argument("prefix", help="path of the pair without .bin or .idx")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--document", type=int, metavar="I", help="show this document, from 0")
    task.add_argument("--verify", action="store_true", help="check every entry, every id and both checksums")
    task.add_argument(
        "--add-manifest", action="store_true", help="write the manifest of files that another program made"
    )
    tokenizer = parser.add_argument_group("tokenizer, instead of the one in the manifest")
    tokenizer.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help=f"default: {_DEFAULT_TYPE}")
    add_tokenizer_places(tokenizer)
    arguments = parser.parse_args(argv)
    _refuse_tokenizer_without_effect(arguments)
    return arguments


def _refuse_tokenizer_without_effect(arguments: argparse.Namespace) -> None:
    given = given_places(arguments)
    if _is_tokenizer_given(arguments):
        given.append("--tokenizer-type")
        refuse_without_effect(arguments, arguments.tokenizer_type or _DEFAULT_TYPE)
    elif given:
        raise ConfigError(f"{' and '.join(given)}: give --tokenizer-type too")
    if given and arguments.document is None and not arguments.verify and not arguments.add_manifest:
        raise ConfigError(f"{given[0]} has no effect without --document, --verify or --add-manifest")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    return run_program(lambda: run(_parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
