"""What a run will cost, as plain values: `RunPlan.to_dict` is what `--json` writes.

Bytes and FLOPs are those of one rank (tensor-parallel ranks of a stage are alike) unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PlanSettings:
    """What a plan is made for, beside the run's own settings."""

    world_size: int
    gpu: str = "A100"
    gpu_memory_gib: float | None = None
    """None: what the maker of the GPU states."""

    mfu: float | None = None
    """Share of the GPU's peak that the run reaches without the teacher, as its log says; None: 0.4."""


@dataclass(frozen=True)
class StageMemory:
    """Memory of one rank of a pipeline stage, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """This rank's share of main weights and moments."""

    activations: int
    """The most that a pass over the microbatches holds beyond the above: kept for backward, messages, temporaries."""

    teacher_weights: int = 0
    teacher_peak: int = 0
    """What else the teacher adds to the peak: its states in flight and what its forward takes."""

    teacher_states: int = 0
    """What the states alone take, of all microbatches between the teacher's forward and the backward of layer k."""

    @property
    def after_stop(self) -> int:
        """Return the peak without the teacher."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def before_stop(self) -> int:
        """Return the peak while the teacher guides."""
        return self.after_stop + self.teacher_weights + self.teacher_peak


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage."""

    stage: int
    ranks: tuple[int, int]
    """First and last global rank of the stage."""

    layers: tuple[int, ...]
    """Global numbers of its transformer layers, from 1; of all its model chunks."""

    has_embedding: bool
    has_head: bool
    parameters: int
    """Of one rank."""

    whole_parameters: int
    """Of the stage, tensor-parallel shards put together; a tied output layer counts on the first stage."""

    memory: StageMemory
    flops: float
    """Of one microbatch, forward and backward, recomputation included, without the teacher."""

    teacher_flops: float = 0.0
    """Of one microbatch of the teacher where this rank runs it whole."""


@dataclass(frozen=True)
class TeacherPlan:
    """What the teacher costs."""

    description: str
    student_layer: int
    stage: int
    stop_iteration: int
    weights_bytes: int
    flops_per_token: float
    """Forward FLOPs."""

    share_of_flops: float
    """Of the student's FLOPs over the whole run's ranks, were the work spread over all of them."""

    slowdown: dict[str, float]
    """Iteration time with the teacher over that without, as FLOPs and pipeline have it: by `planning.pipeline.SHARES`."""

    share: str
    """Which of these the run has."""

    allowed: tuple[str, ...]
    """Which of these a run can have; the others are planned only."""

    is_on_slowest: bool
    """Whether its stage is the slowest of several even without it."""

    is_bottleneck: bool
    """Whether its stage is the slowest of several with it."""


@dataclass(frozen=True)
class BetterSplit:
    """Another deal of the layers, by which the whole run takes less time."""

    layers: tuple[int, ...]
    flags: str
    replaced: tuple[str, ...]
    """Flags of the run that these take the place of: leave them out."""

    saved: float
    """Share of the run's time that it saves, as FLOPs and pipeline have it."""


@dataclass(frozen=True)
class WorkPlan:
    """What the run does."""

    iterations: int
    tokens: int
    flops_per_iteration: float
    """Model FLOPs of all ranks: recomputation and teacher not counted."""


@dataclass(frozen=True)
class TimePlan:
    """How long that takes."""

    tflops_per_device: float
    """Model TFLOP/s of each device, without the teacher."""

    source: str
    """Where that number comes from."""

    seconds_per_iteration: float
    seconds_per_iteration_with_teacher: float | None
    days: float


@dataclass(frozen=True)
class DataPlan:
    """What the run reads of each split, in tokens."""

    needed: dict[str, int]
    present: dict[str, int | None]
    """None where it cannot be counted here."""

    epochs: dict[str, float | None]
    """How often the data set is read that is read most often."""

    is_made_up: bool
    """With --mock-data, of which there is always enough."""


@dataclass(frozen=True)
class RunPlan:
    """A run before it runs."""

    world_size: int
    layout: dict[str, int]
    """Sizes of the parallel dimensions, microbatches and so on, by name."""

    parameters: int
    padded_vocab_size: int
    for_gpu: bool
    stages: tuple[StagePlan, ...]
    teacher: TeacherPlan | None
    work: WorkPlan
    time: TimePlan | None
    """None where no speed is known: on CPU with nothing measured."""

    data: DataPlan
    checkpoint_bytes: int
    better_split: BetterSplit | None
    warnings: tuple[str, ...]
    not_planned: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON's values, each stage's peaks before and after S_stop among them."""
        values = asdict(self)
        for written, stage in zip(values["stages"], self.stages, strict=True):
            memory = stage.memory
            written["memory"].update(before_stop=memory.before_stop, after_stop=memory.after_stop)
        return values
