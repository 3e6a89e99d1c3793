"""Look into a pair of token files: check them, count, and read a document back.

    python tools/inspect_data.py data/pile_text_document --document 0

The tokenizer is the one that the manifest names, unless `--tokenizer-model` gives another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.indexed import check_indexed, max_token_id, read_document
from megatron_let.data.manifest import Manifest, read_manifest, require_manifest_of
from megatron_let.data.preprocess import describe
from megatron_let.data.tokenizers import Tokenizer, build_tokenizer
from megatron_let.errors import EXIT_DONE, ConfigError, LetError

_SHOWN_IDS = 20


def report(arguments: argparse.Namespace) -> list[str]:
    """Return the lines to print. Raises ConfigError for a damaged pair or a missing tokenizer."""
    prefix: str = arguments.prefix
    summary = check_indexed(prefix)
    manifest = read_manifest(prefix)
    lines = [
        f"{prefix}: {summary.documents:,} documents, {summary.sequences:,} sequences, {summary.tokens:,} tokens, "
        f"{summary.tokens / summary.documents:,.1f} tokens a document, {summary.dtype}",
        f"largest token id: {max_token_id(prefix)}",
    ]
    if manifest is None:
        lines.append("no manifest: the tokenizer is unknown")
    else:
        require_manifest_of(manifest, summary)
        lines.append(f"manifest: {describe(manifest, manifest.tokenizer_name)}")
        lines.append(f"tokenizer fingerprint: {manifest.tokenizer_fingerprint}")
    if arguments.document is not None:
        ids = read_document(prefix, arguments.document).tolist()
        shown = " ".join(map(str, ids[:_SHOWN_IDS])) + (" ..." if len(ids) > _SHOWN_IDS else "")
        lines.append(f"document {arguments.document}: {len(ids):,} tokens: {shown}")
        lines.append(_tokenizer_of(arguments, manifest).detokenize(ids))
    return lines


def _tokenizer_of(arguments: argparse.Namespace, manifest: Manifest | None) -> Tokenizer:
    if arguments.tokenizer_model is not None:
        return build_tokenizer(
            tokenizer_type=arguments.tokenizer_type, tokenizer_model=arguments.tokenizer_model
        )
    if manifest is None or manifest.tokenizer_type == "GPT2BPETokenizer":
        raise ConfigError(
            "--document needs --tokenizer-model: no manifest names a tokenizer that can be opened"
        )
    return build_tokenizer(
        tokenizer_type=manifest.tokenizer_type,
        tokenizer_model=manifest.tokenizer_name,
        vocab_size=manifest.vocab_size - 1,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prefix", help="path of the pair without .bin or .idx")
    parser.add_argument("--document", type=int, help="show this document, from 0")
    parser.add_argument("--tokenizer-type", default="HuggingFaceTokenizer", help="with --tokenizer-model")
    parser.add_argument("--tokenizer-model", help="directory or .model file to decode with")
    try:
        print("\n".join(report(parser.parse_args(argv))))
    except LetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
