"""Join pairs of token files into one.

    python tools/merge_data.py --input data/pile-00_text_document data/pile-01_text_document --output-prefix data/pile
    python tools/merge_data.py --input data/shards --output-prefix data/pile

A directory stands for all its pairs, sorted by name. Documents keep their order; every offset is a 64-bit number.
The manifests are joined too: the result says what it was made of. Nothing is written over unless all went well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.merge import find_pairs, merge
from megatron_let.data.preprocess import describe
from megatron_let.data.program import ProgramParser, command_line, run_program, say, utf8_name


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Merge and yield the line to print. Raises LetError."""
    summary, manifest = merge(find_pairs(arguments.input), arguments.output_prefix, say, command_line())
    if manifest is None:
        yield f"{summary.prefix}: {summary.documents:,} documents, {summary.tokens:,} tokens ({summary.dtype})"
    else:
        yield describe(manifest, summary.prefix)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    parser = ProgramParser(__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="pairs, or directories of them"
    )
    parser.add_argument(
        "--output-prefix", required=True, type=utf8_name, help="writes PREFIX.{bin,idx,manifest.json}"
    )
    return run_program(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
