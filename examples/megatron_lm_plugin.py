"""LET for Megatron-LM's pretrain_gpt.py: copy this file beside it and add the lines of docs/megatron-lm.md there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_tensorboard_writer, get_tokenizer, get_wandb_writer

from megatron_let.errors import ConfigError
from megatron_let.let import (
    AlignmentObjective,
    LetSchedule,
    Teacher,
    default_student_layer,
    load_hf_teacher,
    resolve_stop,
    with_bos,
)
from megatron_let.mcore.layer_tap import find_layer
from megatron_let.training.alignment import AlignmentReport
from megatron_let.training.attach import AttachedLet, ForwardStep, HostLoop, attach_let
from megatron_let.training.teacher_bos import bos_of_directory


def add_let_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add LET's flags; for `extra_args_provider`."""
    group = parser.add_argument_group("LET")
    group.add_argument("--let-teacher-load", help="Hugging Face directory of the teacher; LET is on with it")
    group.add_argument(
        "--let-weight", type=float, default=0.1, help="of the alignment at the first iteration"
    )
    group.add_argument("--let-stop-iters", type=int, help="S_stop; default: 15 %% of --train-iters")
    group.add_argument("--let-student-layer", type=int, help="k; default: an eighth of the layers")
    group.add_argument("--let-teacher-layer", type=int, help="1-based; default: the last, after its norm")
    group.add_argument(
        "--let-teacher-bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="before each of the teacher's segments; auto: as its tokenizer does",
    )
    group.add_argument("--let-eod", type=int, help="id of the end of document, for --reset-attention-mask")
    return parser


class LetPlugin:
    """Remembers the model chunks while Megatron-LM builds them, and attaches LET at the first forward step.

    By then the checkpoint has been loaded, and `args.curr_iteration` says where the run stands: after S_stop the
    teacher's files are not needed.
    """

    def __init__(self) -> None:
        self._chunks: list[torch.nn.Module] = []
        self._attached: AttachedLet | None = None
        self._writers = _Writers()
        self._seen: object = None

    def model_provider(self, provider: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
        """Return the model provider, whose chunks are remembered in the order of their virtual stages."""

        @wraps(provider)
        def provide(*args: Any, **kwargs: Any) -> torch.nn.Module:
            chunk = provider(*args, **kwargs)
            self._chunks.append(chunk)
            return chunk

        return provide

    def forward_step(self, forward_step: ForwardStep[Any]) -> ForwardStep[Any]:
        """Return the forward step, with LET when `--let-teacher-load` is given."""

        @wraps(forward_step)
        def step(data_iterator: Any, model: torch.nn.Module) -> Any:
            is_first = self._attached is None
            if get_args().let_teacher_load is None or (is_first and not model.training):
                return forward_step(data_iterator, model)
            if self._attached is None:
                self._attached = self._attach()
            now = (get_args().curr_iteration, model.training)
            if now != self._seen:
                self._seen = now
                self._writers.write()
            return self._attached.forward_step(forward_step)(data_iterator, model)

        return step

    def finish(self) -> None:
        """Report the rest of the last interval; for the line after `pretrain`, on every rank."""
        if self._attached is not None:
            self._attached.finish()
            dist.barrier()
            self._writers.write()

    def reads_data(self, vp_stage: int | None) -> bool:
        """Return whether this model chunk holds layer k, for `is_dataset_built_on_rank`."""
        owner = find_layer(self._chunks, _student_layer()) if get_args().let_teacher_load else None
        return owner is not None and owner[0] == (vp_stage or 0)

    def _attach(self) -> AttachedLet:
        args = get_args()
        stop = resolve_stop(args.train_iters, stop_iters=args.let_stop_iters, stop_fraction=None)
        if args.reset_attention_mask and args.let_eod is None:
            raise ConfigError(
                "--reset-attention-mask: give --let-eod, so that the teacher sees documents apart too"
            )
        return attach_let(
            self._chunks,
            HostLoop(
                iteration=lambda: get_args().curr_iteration,
                num_microbatches=get_num_microbatches,
                report=self._report,
                report_interval=args.log_interval,
            ),
            load_teacher=_load_teacher,
            objective=AlignmentObjective(LetSchedule(args.let_weight, stop), _student_layer()),
            num_ids=get_tokenizer().vocab_size,
            eod=args.let_eod if args.reset_attention_mask else None,
        )

    def _report(self, iteration: int, weight: float, report: AlignmentReport) -> None:
        _print_report(iteration, weight, report)
        self._writers.send(
            iteration,
            {
                "let loss": report.loss,
                "let cosine": report.cosine,
                "let cosine centered": report.centred_cosine,
                "let weight": weight,
            },
        )


class _Writers:
    """Megatron-LM's TensorBoard and W&B, which the last rank alone has: a rank of layer k's stage sends it the numbers.

    Through the store of the process group, since no rank may wait for another inside a forward step.
    """

    def __init__(self) -> None:
        self._num_sent = 0
        self._num_written = 0

    def send(self, iteration: int, numbers: dict[str, float]) -> None:
        """Leave the numbers for the last rank."""
        _store().set(f"let/{self._num_sent}", json.dumps([iteration, numbers]))
        self._num_sent += 1

    def write(self) -> None:
        """Write what has been sent, on the rank that has the writers; nothing waits."""
        board, wandb = get_tensorboard_writer(), get_wandb_writer()
        if board is None and wandb is None:
            return
        while _store().check([f"let/{self._num_written}"]):
            iteration, numbers = json.loads(_store().get(f"let/{self._num_written}"))
            _store().delete_key(f"let/{self._num_written}")
            self._num_written += 1
            for name, value in numbers.items() if board is not None else ():
                board.add_scalar(name, value, iteration)
            if wandb is not None and wandb.run is not None:  # pretrain has finished it when it returns
                wandb.log(numbers, iteration)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def _student_layer() -> int:
    args = get_args()
    return int(args.let_student_layer or default_student_layer(args.num_layers))


def _load_teacher(device: torch.device) -> Teacher:
    args = get_args()
    teacher = load_hf_teacher(
        args.let_teacher_load, layer=args.let_teacher_layer, dtype=args.params_dtype, device=device
    )
    return with_bos(teacher, bos_of_directory(Path(args.let_teacher_load), args.let_teacher_bos))


def _print_report(iteration: int, weight: float, report: AlignmentReport) -> None:
    print(
        f" iteration {iteration:8d} | let loss: {report.loss:.6E} | let cosine: {report.cosine:.6f} | "
        f"let weight: {weight:.6f} |",
        flush=True,
    )
