"""LET on plain tensors: schedule, losses, projection, teacher, objective. Knows nothing of Megatron."""

from megatron_let.let.bos_teacher import BosTeacher, with_bos
from megatron_let.let.hf_teacher import load_hf_teacher
from megatron_let.let.losses import AlignmentLoss, AlignmentSums, cosine_alignment
from megatron_let.let.objective import AlignmentObjective, AlignmentTarget, add_alignment_gradient
from megatron_let.let.projection import interpolate_width
from megatron_let.let.schedule import LetSchedule, default_student_layer, resolve_stop
from megatron_let.let.teacher import Teacher, segment_states

__all__ = [
    "AlignmentLoss",
    "AlignmentObjective",
    "AlignmentSums",
    "AlignmentTarget",
    "BosTeacher",
    "LetSchedule",
    "Teacher",
    "add_alignment_gradient",
    "cosine_alignment",
    "default_student_layer",
    "interpolate_width",
    "load_hf_teacher",
    "resolve_stop",
    "segment_states",
    "with_bos",
]
