"""Build the index cache of a run ahead of it, on a machine without GPUs: no model, no process group.

    python tools/build_data_cache.py --data-path data/pile_text_document --data-cache-path cache --seq-length 2048 ...

takes the command line of `pretrain_let.py` as it is. A run with the same flags then builds nothing, on however many
ranks, as long as the directory is the same for all of them. Prints samples and epochs of each split. Without
`--global-batch-size` give `--world-size` too: the number of ranks of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.program import ProgramParser, run_program
from megatron_let.log import configure_logging, quiet_third_parties


def run(argv: Sequence[str] | None) -> Iterator[str]:
    """Build the cache and yield the lines to print. Raises LetError."""
    parser = ProgramParser(__doc__)
    parser.add_argument("--world-size", type=int, help="ranks of the run")
    own, words = parser.parse_known_args(argv)
    configure_logging(stream=sys.stderr)
    quiet_third_parties()
    # Imported here: megatron-core takes seconds, and warns while it loads.
    from megatron_let.training.arguments import parse_arguments
    from megatron_let.training.data_cache import build_data_cache

    yield from build_data_cache(parse_arguments(words), own.world_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    return run_program(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
