"""Pretrain a GPT with megatron-core, plain or guided by a small frozen teacher (LET, arXiv 2602.05393).

python -m megatron_let.launch --nproc-per-node 8 pretrain_let.py --num-layers 24 ... --let-teacher-load DIR
"""

from __future__ import annotations

import sys

from megatron_let.entry import RunReport, end_program, run_main
from megatron_let.log import configure_logging, quiet_third_parties
from megatron_let.training.plan_program import DRY_RUN, print_plan


def main(report: RunReport) -> int:
    """Parse, build, fit; return the exit code."""
    configure_logging()
    quiet_third_parties()
    if DRY_RUN in sys.argv:
        return print_plan(sys.argv[1:])
    # Imported here: megatron-core takes seconds, and warns while it loads.
    from megatron_let.training.arguments import save_directory_of, settings_of_run
    from megatron_let.training.build import build_trainer
    from megatron_let.training.joining import joined_ranks

    report.saves_to(save_directory_of(sys.argv[1:]))
    config = settings_of_run(sys.argv[1:])
    with joined_ranks(config, report) as (context, stop, heartbeat):
        trainer = build_trainer(config, context, stop, heartbeat)
        try:
            return trainer.fit()
        finally:
            report.iteration = trainer.state.iteration


if __name__ == "__main__":
    end_program(run_main(main))
