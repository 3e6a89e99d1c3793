"""The command line of a plan: `pretrain_let.py ... --dry-run` and `tools/plan_run.py ...`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_let.data.program import ProgramParser, run_program
from megatron_let.errors import EXIT_DONE
from megatron_let.log import LOGGER
from megatron_let.planning.flops import GPUS
from megatron_let.planning.plan import PlanSettings
from megatron_let.planning.table import plan_lines

DRY_RUN = "--dry-run"


def planned_run(argv: Sequence[str], *, description: str | None) -> Iterator[str]:
    """Yield the lines of the plan of a command line, `pretrain_let.py`'s with the plan's own flags.

    Raises:
        ConfigError: the run could not start as it is.
    """
    parser = ProgramParser(description)
    default = PlanSettings(world_size=int(os.environ.get("WORLD_SIZE", "1")))
    parser.add_argument(DRY_RUN, action="store_true", help="plan, and run nothing")
    parser.add_argument(
        "--world-size", type=int, default=default.world_size, help="ranks of the run (default: 1)"
    )
    gpus = ", ".join(GPUS)
    parser.add_argument("--gpu", default=default.gpu, help=f"one of {gpus} (default: {default.gpu})")
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        help="of one GPU (default: as its maker states it)",
    )
    parser.add_argument(
        "--mfu", type=float, help="share of the GPU's peak that the run reaches (default: 0.4)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan there too")
    own, words = parser.parse_known_args(argv)
    settings = PlanSettings(own.world_size, own.gpu, own.gpu_memory_gib, own.mfu)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is here has no part in a plan
    # Imported here: torch looks for GPUs while megatron-core loads.
    from megatron_let.training.arguments import parse_arguments
    from megatron_let.training.plan import make_plan

    plan = make_plan(parse_arguments(words), settings)
    if own.json is not None:
        Path(own.json).write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    yield from plan_lines(plan)


def print_plan(argv: Sequence[str]) -> int:
    """Print the plan of a command line with `--dry-run`, on rank 0 of as many as were started; return the exit code."""
    if os.environ.get("RANK", "0") != "0":
        return EXIT_DONE
    LOGGER.setLevel(logging.WARNING)
    return run_program(lambda: planned_run(argv, description=None))
