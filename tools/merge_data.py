"""Join pairs of token files into one.

    python tools/merge_data.py --input data/pile-00_text_document data/pile-01_text_document --output-prefix data/pile
    python tools/merge_data.py --input data/shards --output-prefix data/pile

A directory stands for all its pairs, sorted by name. Documents keep their order; every offset is a 64-bit number.
The manifests are joined too: the result says what it was made of. Nothing is written over unless all went well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.merge import find_pairs, merge
from megatron_let.data.preprocess import describe
from megatron_let.errors import EXIT_DONE, LetError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="pairs, or directories of them"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.{bin,idx,manifest.json}")
    arguments = parser.parse_args(argv)
    try:
        prefixes = find_pairs(arguments.input)
        summary, manifest = merge(
            prefixes, arguments.output_prefix, lambda line: print(line, file=sys.stderr)
        )
    except LetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if manifest is None:
        print(
            f"{summary.prefix}: {summary.documents:,} documents, {summary.tokens:,} tokens ({summary.dtype})"
        )
    else:
        print(describe(manifest, summary.prefix))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
