"""Where NaN and infinity came from: what each rank saw of a bad iteration, and the one sentence made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from megatron_let.mcore.finite import Norms
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.student_watch import StudentWatch
from megatron_let.training.alignment import Alignment


class Kind(Enum):
    """What was not finite."""

    OUTPUT = "output of a model chunk"
    LOSS = "lm loss"
    TEACHER = "the teacher's states"
    ALIGNMENT = "LET's loss or its gradient"
    INPUT_GRADIENT = "gradient at the input of a model chunk"
    GRADIENT = "a parameter's gradient on its own rank"
    REDUCED = "a parameter's gradient after communication"
    WEIGHT = "a parameter"


@dataclass(frozen=True)
class Finding:
    """One thing that was not finite on one rank; plain values, for other ranks to read."""

    kind: Kind
    value: str
    """nan or inf."""

    rank: int
    place: str
    """The rank in words: its number and where it stands in the layout."""

    position: int = 0
    """Of the model chunk in the whole pipeline."""

    microbatch: int = 0
    """Counted from 0."""

    num_microbatches: int = 1

    parameter: str = ""
    others: int = 0
    """Parameters of this rank that are as bad as `parameter`."""

    @property
    def where(self) -> str:
        """Return rank and microbatch in words."""
        return f"{self.place}, microbatch {self.microbatch + 1} of {self.num_microbatches}"


def place_of(context: ParallelContext) -> str:
    """Return where this rank stands: `rank 3 (pipeline stage 1, tensor 0, data 1)`."""
    parts = [
        f"pipeline stage {context.pp_rank}",
        f"tensor {context.tp_rank}",
        *([f"context {context.cp_rank}"] if context.cp_size > 1 else []),
        f"data {context.dp_rank}",
    ]
    return f"rank {context.rank} ({', '.join(parts)})"


class Search:
    """Reads what one rank recorded in a bad iteration; waits for the device, so for bad iterations alone."""

    def __init__(self, context: ParallelContext, watch: StudentWatch, alignment: Alignment | None) -> None:
        self._context, self._watch, self._alignment = context, watch, alignment

    def findings(self, losses: Sequence[Tensor]) -> list[Finding]:
        """Return what is not finite on this rank; `losses`: [sum, count] of each microbatch, on the last stage."""
        found = []
        for chunk in self._watch.chunks:
            found += self._of(Kind.OUTPUT, chunk.outputs.read(), chunk.position)
            found += self._of(Kind.INPUT_GRADIENT, chunk.input_gradients.read(), chunk.position)
        found += self._of(Kind.LOSS, [float(loss[0]) for loss in losses], self._watch.chunks[-1].position)
        if self._alignment is not None:
            norms = self._alignment.norms
            found += self._of(Kind.TEACHER, norms.states.read())
            found += self._of(Kind.ALIGNMENT, _worst(norms.losses, norms.gradients))
        found += self._parameters(Kind.GRADIENT, self._watch.bad_gradients)
        found += self._parameters(Kind.WEIGHT, self._watch.bad_weights)
        return found

    def reduced(self) -> list[Finding]:
        """Return the parameter whose gradient is not finite after communication."""
        return self._parameters(Kind.REDUCED, self._watch.bad_reduced_gradients)

    def bad_weights(self) -> list[Finding]:
        """Return the parameter that is not finite itself."""
        return self._parameters(Kind.WEIGHT, self._watch.bad_weights)

    def _of(self, kind: Kind, values: Sequence[float], position: int = 0) -> list[Finding]:
        """Return the first bad one of `values`, one a microbatch."""
        for microbatch, value in enumerate(values):
            if not math.isfinite(value):
                context = self._context
                place, count = place_of(context), len(values)
                return [Finding(kind, _word(value), context.rank, place, position, microbatch, count)]
        return []

    def _parameters(self, kind: Kind, read: Callable[[], list[tuple[str, float]]]) -> list[Finding]:
        """Return the last bad parameter in the model's order: backward met it first."""
        bad = read()
        if not bad:
            return []
        name, value = bad[-1]
        context, position = self._context, self._watch.chunks[-1].position
        return [
            Finding(
                kind,
                _word(value),
                context.rank,
                place_of(context),
                position,
                parameter=name,
                others=len(bad) - 1,
            )
        ]


def _worst(losses: Norms, gradients: Norms) -> list[float]:
    """Return for each microbatch a value that is bad when its loss or its gradient is."""
    return [loss + gradient for loss, gradient in zip(losses.read(), gradients.read(), strict=True)]


def _word(value: float) -> str:
    return "nan" if math.isnan(value) else "inf"


def describe(findings: Sequence[Finding], *, grad_norm: float | None = None) -> str:
    """Return what was bad and where it began, in one sentence without a full stop.

    `findings` are those of all ranks. Forward: the earliest stage with a bad output. LET: only where the student's own
    forward is sound. Backward: the latest stage whose own input gradient is bad. `grad_norm` is given when nothing but
    the reduced gradient's norm told.
    """
    parts = [
        f"the weight {_parameter(each)} itself holds {each.value} on {each.place}"
        for each in _first(findings, Kind.WEIGHT)
    ]
    forward = _first(findings, Kind.OUTPUT, Kind.LOSS)
    aligned = [] if forward else _first(findings, Kind.ALIGNMENT)
    backward = [] if forward or aligned else _first(findings, Kind.INPUT_GRADIENT, is_backward=True)
    losses = _first(findings, Kind.LOSS)
    parts += [f"lm loss {(losses or forward)[0].value}, first on {each.where}" for each in forward]
    parts += [f"LET loss {each.value} (the lm loss is finite) on {each.where}" for each in aligned]
    parts += [f"gradient {each.value}, first on {each.where}" for each in backward]
    gradients = _first(
        findings, Kind.GRADIENT, is_backward=True, rank=_rank_of([*forward, *aligned, *backward])
    )
    parts += [f"gradient {each.value} in {_parameter(each)} (rank {each.rank})" for each in gradients]
    if grad_norm is not None and not gradients:
        reduced = _first(findings, Kind.REDUCED, is_backward=True)
        parts += [
            f"gradient {each.value} in {_parameter(each)}, only in the sum over ranks (rank {each.rank} looked)"
            for each in reduced
        ] or [f"gradient norm {_word(grad_norm)}, though every single gradient is finite"]
    return "; ".join(parts)


def first_of(findings: Sequence[Finding], kind: Kind) -> Finding | None:
    """Return the finding of `kind` in the earliest microbatch, on the earliest stage and the lowest rank."""
    return next(iter(_first(findings, kind)), None)


def _first(
    findings: Sequence[Finding], *kinds: Kind, is_backward: bool = False, rank: int | None = None
) -> list[Finding]:
    """Return the first finding of these kinds in the order things were computed, those on `rank` before others."""
    sign = -1 if is_backward else 1
    chosen = [each for each in findings if each.kind in kinds]
    return sorted(chosen, key=lambda x: (x.rank != rank, x.microbatch, sign * x.position, x.rank))[:1]


def _rank_of(findings: Sequence[Finding]) -> int | None:
    return findings[0].rank if findings else None


def _parameter(finding: Finding) -> str:
    more = f" and {finding.others} other parameters" if finding.others else ""
    return finding.parameter + more
