"""What a run will cost, before it runs: memory, time, the teacher's share, checkpoints, data. No GPU, no weights.

    python tools/plan_run.py --world-size 32 --num-layers 32 ... [--mfu 0.45] [--json plan.json]

takes the command line of `pretrain_let.py` as it is (`pretrain_let.py ... --dry-run` does the same). Every pipeline stage
is built by the program itself on torch's meta device, and its schedule run there: parameters and what is kept for
backward are the program's own. A teacher needs its config.json alone. The run is taken to be one on GPUs unless
`--distributed-backend gloo` is given. Time follows from --mfu: give that which the log of a like run says.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_let.data.program import run_program
from megatron_let.log import configure_logging, quiet_third_parties


def run(argv: Sequence[str] | None) -> Iterator[str]:
    """Make the plan and yield the lines to print. Raises LetError."""
    configure_logging(stream=sys.stderr)
    quiet_third_parties()
    # Imported here: megatron-core takes seconds, and warns while it loads.
    from megatron_let.training.plan_program import planned_run

    yield from planned_run(sys.argv[1:] if argv is None else argv, description=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status; an error is one line on stderr."""
    return run_program(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
