"""What `tools/benchmark.py` runs: named shapes, the flags of `pretrain_let.py` that they mean, and LET's FLOP floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from benchmark_reference import GptShape, LoopSettings

LOG_INTERVAL = 10


@dataclass(frozen=True)
class BenchmarkShape:
    """A student, a teacher and the batch they see."""

    student: GptShape
    teacher: GptShape
    micro_batch_size: int
    global_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens of a global batch."""
        return self.global_batch_size * self.student.seq_length


def _gpt(
    layers: int,
    width: int,
    ffn: int,
    heads: int,
    *,
    seq_length: int,
    vocab_size: int = 2048,
    groups: int | None = None,
) -> GptShape:
    return GptShape(
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_query_groups=groups or heads,
        seq_length=seq_length,
        vocab_size=vocab_size,
    )


SHAPES: Mapping[str, BenchmarkShape] = MappingProxyType(
    {
        "quickstart": BenchmarkShape(
            _gpt(8, 192, 512, 6, seq_length=128), _gpt(4, 96, 240, 3, seq_length=128), 4, 8
        ),
        "large": BenchmarkShape(
            _gpt(8, 256, 688, 8, seq_length=512), _gpt(4, 128, 344, 4, seq_length=512), 2, 4
        ),
        # For the memory figures: a teacher large enough to be seen beside an interpreter with its libraries.
        "large-teacher": BenchmarkShape(
            _gpt(8, 256, 688, 8, seq_length=512), _gpt(8, 512, 1376, 8, seq_length=512), 2, 4
        ),
        "1.4B": BenchmarkShape(
            _gpt(24, 2048, 5504, 16, seq_length=2048, vocab_size=49152),
            _gpt(30, 576, 1536, 9, seq_length=2048, vocab_size=49152, groups=3),
            4,
            8,
        ),
        "tiny": BenchmarkShape(
            _gpt(2, 32, 64, 4, seq_length=16, vocab_size=128, groups=2),
            _gpt(1, 16, 32, 2, seq_length=16, vocab_size=128),
            1,
            2,
        ),
    }
)
"""By name: the quickstart's; a larger one; one for memory; the paper's 1.4B with SmolLM-135M's shape (for GPUs)."""


def loop_settings(shape: BenchmarkShape, *, world_size: int, is_fused: bool, is_bf16: bool) -> LoopSettings:
    """Return the loop around the student on `world_size` data-parallel ranks, at the same global batch.

    Raises:
        ValueError: the ranks do not divide the global batch.
    """
    num_microbatches, rest = divmod(shape.global_batch_size, shape.micro_batch_size * world_size)
    if rest or not num_microbatches:
        raise ValueError(
            f"a global batch of {shape.global_batch_size} in microbatches of {shape.micro_batch_size} does not "
            f"divide among {world_size} ranks"
        )
    return LoopSettings(
        micro_batch_size=shape.micro_batch_size,
        num_microbatches=num_microbatches,
        learning_rate=1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        clip_grad=1.0,
        is_fused=is_fused,
        log_interval=LOG_INTERVAL,
        is_bf16=is_bf16,
    )


def training_flags(shape: GptShape, settings: LoopSettings, *, world_size: int, num_steps: int) -> list[str]:
    """Return the words of `pretrain_let.py` for this model and loop, data and directories left out."""
    global_batch_size = settings.micro_batch_size * settings.num_microbatches * world_size
    values: dict[str, object] = {
        "--num-layers": shape.num_layers,
        "--hidden-size": shape.hidden_size,
        "--ffn-hidden-size": shape.ffn_hidden_size,
        "--num-attention-heads": shape.num_heads,
        "--num-query-groups": shape.num_query_groups,
        "--seq-length": shape.seq_length,
        "--position-embedding-type": "rope",
        "--rotary-base": int(shape.rotary_base),
        "--normalization": "RMSNorm",
        "--norm-epsilon": shape.norm_eps,
        "--init-method-std": shape.init_std,
        "--hidden-dropout": 0,
        "--attention-dropout": 0,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": shape.vocab_size - 1,  # and the end of document
        "--make-vocab-size-divisible-by": 1,
        "--micro-batch-size": settings.micro_batch_size,
        "--global-batch-size": global_batch_size,
        "--train-iters": num_steps,
        "--lr": settings.learning_rate,
        "--lr-decay-style": "constant",
        "--weight-decay": settings.weight_decay,
        "--adam-beta1": settings.betas[0],
        "--adam-beta2": settings.betas[1],
        "--adam-eps": settings.eps,
        "--clip-grad": settings.clip_grad,
        "--eval-iters": 0,
        "--num-workers": 0,
        "--log-interval": settings.log_interval,
    }
    switches = [
        "--group-query-attention",
        "--swiglu",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
    ]
    if settings.is_bf16:
        switches.append("--bf16")
    return [*(str(word) for pair in values.items() for word in pair), *switches]


def body_parameters(shape: GptShape) -> int:
    """Return the parameters of the transformer blocks and the final norm: no embedding, no LM head."""
    h, key_value = shape.hidden_size, shape.num_query_groups * shape.head_width
    attention = h * (2 * h + 2 * key_value)
    mlp = 3 * h * shape.ffn_hidden_size
    return shape.num_layers * (attention + mlp + 2 * h) + h


def flop_floor(shape: BenchmarkShape) -> float:
    """Return N_T / (3 N_S), what a teacher's forward adds to a step at the least, as a fraction of it.

    A token's matrix products: the teacher is its body without LM head, the student its body and LM head; embeddings
    are looked up, not multiplied. A step is forward and backward, three times the forward.
    """
    student = body_parameters(shape.student) + shape.student.hidden_size * shape.student.vocab_size
    return body_parameters(shape.teacher) / (3.0 * student)
