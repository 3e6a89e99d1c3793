"""What a run settled for where its settings left a choice: the log says it once, every checkpoint's settings file too."""

from __future__ import annotations

from megatron_let.config.run_config import RunConfig
from megatron_let.mcore.layer_tap import find_layer
from megatron_let.mcore.model import Student
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.mcore.transformer_config import available_fusions, uses_transformer_engine
from megatron_let.training.let_record import LetRecord


def resolved_choices(
    config: RunConfig, context: ParallelContext, student: Student, let_record: LetRecord | None
) -> list[str]:
    """Return in words which layers and fused kernels the student has, and what LET does; every rank must call this."""
    is_te = uses_transformer_engine(config, is_on_gpu=context.is_on_gpu)
    kernels = (*available_fusions(config, is_on_gpu=context.is_on_gpu), "cross_entropy_loss_fusion")
    fusions = [name for name in kernels if getattr(student.core_config, name)]
    named = ", ".join(name.removesuffix("_fusion").replace("_", " ") for name in fusions)
    return [
        f"layers: {'Transformer Engine' if is_te else 'stock (PyTorch attention)'}",
        f"fusions: {named or 'none'}",
        "LET: off" if let_record is None else _let(config, context, student, let_record),
    ]


def _let(config: RunConfig, context: ParallelContext, student: Student, record: LetRecord) -> str:
    is_here = find_layer(student.gpt_chunks, record.student_layer) is not None
    stage = next(rank for rank in context.gather(context.pp_rank if is_here else None) if rank is not None)
    depth = "last layer" if record.teacher_layer is None else f"layer {record.teacher_layer}"
    bos = "" if record.teacher_bos is None else f", bos {record.teacher_bos} before each segment"
    return (
        f"LET: student layer {record.student_layer} of {config.transformer.num_layers} on pipeline stage {stage}, "
        f"weight {record.weight} to 0 at iteration {record.stop_iteration}, {depth} of teacher {config.let.let_teacher_load}{bos}"
    )
