"""Put NaN or infinity into one place of a run, and see what it makes of it, iteration by iteration."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from megatron_let.config.derive import resolve
from megatron_let.errors import BadNumbersError
from megatron_let.let import AlignmentSums
from megatron_let.let.losses import cosine_alignment
from megatron_let.mcore.optimizer import schedule_state
from megatron_let.mcore.parallel import parallel_context
from megatron_let.training import alignment as alignment_module
from megatron_let.training.arguments import parse_arguments
from megatron_let.training.build import build_trainer
from megatron_let.training.signals import StopRequest
from megatron_let.training.trainer import Trainer
from tests.training.bad_input import logged_lines


@dataclass(frozen=True)
class Fault:
    """What goes bad: a number in `place`, in these iterations (from 1), on `rank` (None: all), in `microbatch` (from 0)."""

    place: str
    iterations: tuple[int, ...]
    rank: int | None = None
    microbatch: int | None = None
    value: float = math.nan
    parameter: str = ""


@dataclass
class Told:
    """What a run said and held on one rank."""

    code: int | None = None
    error: str = ""
    lines: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    """Hashes of weights, optimizer and schedule: before the first iteration and after each."""

    iterations: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(iteration, consumed samples, skipped, nan) after each."""

    loss_scales: list[float] = field(default_factory=list)
    teacher_calls: int = 0

    def warnings(self, text: str) -> list[str]:
        """Return the warnings that hold `text`."""
        return [line for line in self.lines if line.startswith("WARNING") and text in line]

    def is_changed(self) -> list[bool]:
        """Return for each iteration whether weights, optimizer or schedule have changed."""
        return [before != after for before, after in zip(self.states, self.states[1:], strict=False)]


class _Clock:
    """Whether the fault is due in the microbatch that a place meets next."""

    def __init__(self, fault: Fault, trainer: Trainer) -> None:
        self._fault, self._trainer = fault, trainer
        self._iteration, self._microbatch = -1, 0

    def is_due(self) -> bool:
        fault, iteration = self._fault, self._trainer.state.iteration + 1
        if iteration != self._iteration:
            self._iteration, self._microbatch = iteration, 0
        microbatch, self._microbatch = self._microbatch, self._microbatch + 1
        return (
            iteration in fault.iterations
            and fault.rank in (None, self._trainer.run.context.rank)
            and fault.microbatch in (None, microbatch)
        )


def train_with(argv: list[str], fault: Fault) -> Told:
    """Train on this rank with `fault` and return what came of it."""
    config = resolve(parse_arguments(argv), int(os.environ.get("WORLD_SIZE", "1")))
    told = Told()
    with parallel_context(config) as context, logged_lines() as told.lines:
        trainer = build_trainer(config, context, StopRequest())
        clock = _Clock(fault, trainer)
        with ExitStack() as stack:
            stack.enter_context(_PLACES[fault.place](trainer, clock, fault, told))
            stack.enter_context(_recorded(trainer, told))
            try:
                told.code = trainer.fit()
            except BadNumbersError as error:
                told.code, told.error = error.exit_code, str(error)
    return told


@contextmanager
def _recorded(trainer: Trainer, told: Told) -> Iterator[None]:
    run, plain = trainer.run, trainer._iterate
    optimizer: Any = run.parts.optimizer

    def iterate(iterators: list[Any]) -> None:
        if not told.states:
            told.states.append(_hash(trainer))
        plain(iterators)
        state = trainer.state
        told.states.append(_hash(trainer))
        told.iterations.append(
            (state.iteration, state.consumed_samples, state.skipped_iterations, state.nan_iterations)
        )
        told.loss_scales.append(float(optimizer.get_loss_scale()))

    with patch.object(trainer, "_iterate", iterate):
        yield


def _hash(trainer: Trainer) -> str:
    """Return a digest of weights, optimizer state and schedule of this rank."""
    parts, digest = trainer.run.parts, hashlib.sha256()
    assert parts.scheduler is not None
    optimizer: Any = parts.optimizer
    tensors = [each.detach() for chunk in parts.student.gpt_chunks for each in chunk.parameters()]
    if any(chunk.ddp_config.overlap_param_gather for chunk in parts.student.chunks):
        tensors = []  # they are gathered in the next forward: what the optimizer holds of them is looked at below
    for part in optimizer.chained_optimizers:
        tensors += [each.detach() for group in part.optimizer.param_groups for each in group["params"]]
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        digest.update(
            tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"%r" % float(tensor)
        )
    digest.update(repr(sorted(schedule_state(parts.scheduler).items())).encode())
    return digest.hexdigest()


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    """Remove hooks at the end: they lead from the model back to the run, which would stay with its process groups."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _nothing(*_: Any) -> Iterator[None]:
    yield


@contextmanager
def _in_embedding(trainer: Trainer, clock: _Clock, fault: Fault, _: Told) -> Iterator[None]:
    """The first stage's embedding gives a bad number."""
    chunk = trainer.run.parts.student.gpt_chunks[0]
    with ExitStack() as hooks:
        if chunk.pre_process:
            embedding = chunk.embedding
            spoil = embedding.register_forward_hook(lambda *args: _spoil(args[-1], clock, fault))
            hooks.enter_context(_hooked(spoil))
        yield


@contextmanager
def _in_losses(trainer: Trainer, clock: _Clock, fault: Fault, _: Told) -> Iterator[None]:
    """The losses of the tokens are larger by a number that no gradient knows of."""
    chunk = trainer.run.parts.student.gpt_chunks[-1]
    with ExitStack() as hooks:
        if chunk.post_process:
            add = chunk.register_forward_hook(
                lambda *args: args[-1] + fault.value if clock.is_due() else None
            )
            hooks.enter_context(_hooked(add))
        yield


@contextmanager
def _in_output(trainer: Trainer, clock: _Clock, fault: Fault, _: Told) -> Iterator[None]:
    """The last layer of the last chunk on a rank gives a bad number."""
    chunk = trainer.run.parts.student.gpt_chunks[-1]
    with _hooked(chunk.decoder.register_forward_hook(lambda *args: _spoil(args[-1], clock, fault))):
        yield


@contextmanager
def _in_backward(trainer: Trainer, clock: _Clock, fault: Fault, _: Told) -> Iterator[None]:
    """The gradient that comes back into the last layer of a rank is bad; the loss is not."""
    chunk = trainer.run.parts.student.gpt_chunks[-1]

    def watch(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(lambda gradient: _spoil(gradient, clock, fault))

    with _hooked(chunk.decoder.register_forward_hook(watch)):
        yield


@contextmanager
def _in_parameter(trainer: Trainer, clock: _Clock, fault: Fault, _: Told) -> Iterator[None]:
    """The gradients of the parameters that `fault.parameter` ends hold a bad number."""
    named = [item for chunk in trainer.run.parts.student.gpt_chunks for item in chunk.named_parameters()]
    hooks = [
        parameter.register_hook(partial(_spoil_main_gradient, parameter, _Clock(fault, trainer), fault))
        for name, parameter in named
        if name.endswith(fault.parameter)
    ]
    with _hooked(*hooks):
        yield


@contextmanager
def _in_teacher(trainer: Trainer, clock: _Clock, fault: Fault, told: Told) -> Iterator[None]:
    """The teacher's states hold a bad number; with value 0 all of them are zero."""
    plain = alignment_module.segment_states

    def states(*args: Any) -> torch.Tensor:
        told.teacher_calls += 1
        real = plain(*args)
        return torch.zeros_like(real) if fault.value == 0 and clock.is_due() else _spoil(real, clock, fault)

    with patch.object(alignment_module, "segment_states", states):
        yield


@contextmanager
def _in_masked_teacher(trainer: Trainer, clock: _Clock, _: Fault, __: Told) -> Iterator[None]:
    """The teacher's states are bad where the loss mask is 0, and nowhere else."""
    alignment = trainer.run.alignment
    assert alignment is not None
    plain = alignment._target

    def target(batch: Any, states: torch.Tensor) -> Any:
        masked = (batch.loss_mask == 0)[..., None]  # [b, s, 1]
        return plain(batch, states.masked_fill(masked, math.nan) if clock.is_due() else states)

    with patch.object(alignment, "_target", target):
        yield


@contextmanager
def _in_weight(trainer: Trainer, clock: _Clock, fault: Fault, _: Told) -> Iterator[None]:
    """A weight becomes bad before an iteration's first microbatch, and stays so."""
    chunk = trainer.run.parts.student.gpt_chunks[0]

    def spoil(*_: Any) -> None:
        if clock.is_due():
            chunk.get_parameter(fault.parameter).data.view(-1)[5] = fault.value

    with _hooked(chunk.register_forward_pre_hook(spoil)):
        yield


@contextmanager
def _in_let(trainer: Trainer, clock: _Clock, fault: Fault, _: Told) -> Iterator[None]:
    """LET's loss is bad, and with it its gradient; with `parameter` "gradient" only the latter is."""
    alignment = trainer.run.alignment
    assert alignment is not None

    def loss(hidden: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> AlignmentSums:
        sums = cosine_alignment(hidden, states, mask)
        if not clock.is_due():
            return sums
        # the derivative of sqrt at 0 is infinite, its value there is 0
        bad = (hidden * 0).sum().sqrt() if fault.parameter == "gradient" else fault.value * hidden.sum()
        return dataclasses.replace(sums, loss_sum=sums.loss_sum + bad)

    alignment.objective = dataclasses.replace(alignment.objective, loss=loss)
    yield


def _spoil_main_gradient(parameter: Any, clock: _Clock, fault: Fault, _: torch.Tensor) -> None:
    """What autograd hands out may be a dummy: the gradient is added to the buffer inside the layer."""
    if clock.is_due():
        parameter.main_grad.view(-1)[5] += fault.value


def _spoil(tensor: torch.Tensor, clock: _Clock, fault: Fault) -> torch.Tensor:
    if not clock.is_due():
        return tensor
    bad = torch.zeros_like(tensor)
    bad.view(-1)[5] = fault.value
    return tensor + bad


_PLACES: dict[str, Callable[..., Any]] = {
    "nowhere": _nothing,
    "embedding": _in_embedding,
    "spike": _in_losses,
    "output": _in_output,
    "backward": _in_backward,
    "parameter": _in_parameter,
    "teacher": _in_teacher,
    "masked teacher": _in_masked_teacher,
    "weight": _in_weight,
    "let": _in_let,
}
