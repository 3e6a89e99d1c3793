"""How long an iteration takes beside another one, from the FLOPs of each pipeline stage, and how to deal layers better.

An estimate: stages take time as their FLOPs, and messages none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

SHARES = ("none", "tensor", "tensor-pipeline")
"""Who computes the teacher: every rank of its stage the whole, its tensor-parallel group together, all stages together."""


@dataclass(frozen=True)
class Pipeline:
    """The costs of a microbatch for one rank, in FLOPs, and the schedule."""

    layers: tuple[tuple[int, ...], ...]
    """Global numbers (from 1) of each stage's transformer layers."""

    layer: float
    """Cost of a layer."""

    head: float
    """Cost of the output layer, on the last stage."""

    num_microbatches: int
    num_chunks: int
    """Model chunks of a stage, 1 without the interleaved schedule."""

    def stages(self, teacher: float = 0.0, student_layer: int = 1, *, spread: float = 0.0) -> list[float]:
        """Return the cost of each stage: with `teacher` more on that of layer k, and `spread` more on every one."""
        costs = [len(numbers) * self.layer + spread for numbers in self.layers]
        costs[-1] += self.head
        costs[self.owner(student_layer)] += teacher
        return costs

    def owner(self, student_layer: int) -> int:
        """Return the stage that has layer `student_layer`."""
        return next(stage for stage, numbers in enumerate(self.layers) if student_layer in numbers)

    def iteration(self, stages: Sequence[float]) -> float:
        """Return the cost of an iteration under the one-forward-one-backward schedule.

        The slowest stage sets the pace of every microbatch; the work of the others shows once, while the pipeline fills
        and drains, and of that only one chunk's part (arXiv 2104.04473, section 2.2). Exact for even stages; where one
        is slower, at most the others' work on one microbatch too much.
        """
        slowest = max(stages)
        return self.num_microbatches * slowest + (sum(stages) - slowest) / self.num_chunks

    def slowdown(self, teacher: float, student_layer: int, share: str, tensor_size: int) -> float:
        """Return an iteration's cost with a teacher of cost `teacher` over that without, by who computes it."""
        if share == "tensor-pipeline":
            stages = self.stages(spread=teacher / tensor_size / len(self.layers))
        else:
            stages = self.stages(teacher / (1 if share == "none" else tensor_size), student_layer)
        return self.iteration(stages) / self.iteration(self.stages())

    def other_splits(self) -> Iterator[Pipeline]:
        """Yield this pipeline with every other first and last stage, the stages between them even."""
        total, between = sum(map(len, self.layers)), len(self.layers) - 2
        for first in range(self.num_chunks, total, self.num_chunks):
            for last in range(self.num_chunks, total - first + 1, self.num_chunks):
                rest = total - first - last
                if between and rest > 0 and rest % (between * self.num_chunks) == 0:
                    counts = (first, *[rest // between] * between, last)
                elif between == 0 and rest == 0:
                    counts = (first, last)
                else:
                    continue
                yield replace(self, layers=dealt(counts, self.num_chunks))


def dealt(counts: Sequence[int], num_chunks: int) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of each stage's layers when it has `counts` of them: stages take turns, chunk by chunk."""
    stages: list[list[int]] = [[] for _ in counts]
    last = 0
    for _ in range(num_chunks):
        for numbers, count in zip(stages, counts, strict=True):
            first, last = last, last + count // num_chunks
            numbers += range(first + 1, last + 1)
    return tuple(map(tuple, stages))
