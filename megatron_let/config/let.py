"""LET: a frozen small teacher guides an early layer of the student for the first iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LetConfig:
    """The method's own settings (arXiv 2602.05393). Without --let-teacher-load the run is plain pretraining."""

    let_teacher_load: str | None = None
    """Teacher: a Hugging Face directory or a Megatron checkpoint directory. Turns LET on."""

    let_teacher_format: Literal["auto", "hf", "megatron"] = "auto"
    """What --let-teacher-load is."""

    let_student_layer: int | None = None
    """Student layer whose output is aligned, counted from 1. Default: max(1, round(layers / 8))."""

    let_teacher_layer: int | None = None
    """Teacher layer to align with, counted from 1. Default: the last, after the final norm."""

    let_weight: float = 0.1
    """Weight of the alignment loss at the first iteration; it falls linearly to 0."""

    let_stop_iters: int | None = None
    """Iteration from which the teacher is gone; either this or --let-stop-fraction."""

    let_stop_fraction: float | None = None
    """The same as a share of the run. Default: 0.15."""

    let_loss: Literal["cosine", "logsum", "cca"] = "cosine"
    """Alignment loss."""

    let_projection: Literal["interpolate", "linear"] = "interpolate"
    """How teacher states are brought to the student's width."""

    let_control: Literal["none", "random-teacher", "shuffled-states", "teacher-free"] = "none"
    """Control experiment to run instead of LET."""

    let_share_teacher: Literal["none", "tensor", "tensor-pipeline"] = "none"
    """Ranks that share the teacher's work."""

    let_teacher_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number type of the teacher. auto: the student's compute type."""

    let_teacher_bos: Literal["auto", "on", "off"] = "auto"
    """Beginning-of-sequence token before each of the teacher's segments. auto: as its tokenizer does."""

    let_trust_remote_code: bool = False
    """Run Python code that comes with the teacher's directory."""

    let_override: bool = False
    """On resume accept other LET settings than the checkpoint's."""

    objective: Literal["lm", "rkd", "salt"] = "lm"
    """Training objective: language modelling (LET adds to it), or a distillation baseline."""

    @property
    def is_on(self) -> bool:
        """Return whether a teacher was given."""
        return self.let_teacher_load is not None
