"""The student beyond what megatron-core's TransformerConfig holds, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_let.config.setting import filled_later, option


@dataclass(frozen=True)
class ModelConfig:
    """Sequence, positions, embeddings and activation of the student."""

    seq_length: int = filled_later()
    """Number of tokens in a training sequence."""

    max_position_embeddings: int = filled_later()
    """Largest number of positions the model can take; at least --seq-length, which is the default."""

    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """Kind of position embedding."""

    use_rotary_position_embeddings: bool = False
    """Old spelling of --position-embedding-type rope."""

    add_position_embedding: bool = option(True, off_flags=("--no-position-embedding",))
    """Old spelling that goes with rope; without rope use --position-embedding-type none."""

    rotary_base: int = 10000
    """Base of the rotary frequencies."""

    rotary_percent: float = 1.0
    """Share of each head's dimensions that is rotated."""

    rotary_seq_len_interpolation_factor: int | None = None
    """Divide positions by this factor before rotating (linear interpolation to longer sequences)."""

    use_rope_scaling: bool = False
    """Scale the rotary frequencies as LLaMA 3.1 does."""

    rope_scaling_factor: float = 8.0
    """Factor of --use-rope-scaling."""

    group_query_attention: bool = False
    """Let groups of query heads share keys and values; --num-query-groups says how many groups."""

    swiglu: bool = False
    """Gated MLP with SiLU instead of GELU. Makes the default of --ffn-hidden-size 8/3 of the hidden size."""

    squared_relu: bool = False
    """Squared ReLU instead of GELU in the MLP."""

    bias_gelu_fusion: bool | None = None
    """Fuse bias and GELU, which is then the tanh approximation. Default: off, the exact GELU."""

    bias_swiglu_fusion: bool | None = None
    """Fuse bias and SwiGLU. Default: where a fused kernel is available."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weights instead of the word embedding's."""

    vocab_size: int | None = None
    """Vocabulary before padding. With NullTokenizer N means N + 1 ids; else it must be the tokenizer's."""

    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this number times the tensor-parallel size."""

    mask_padded_logits: bool = True
    """Let the ids that pad the vocabulary take part in the softmax, as in Megatron-LM. Default: they have no probability."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Which layers: Transformer Engine's, or the stock ones. auto: Transformer Engine's when installed."""

    use_flash_attn: bool = False
    """Old spelling of --attention-backend flash."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Where token ids come from."""

    tokenizer_type: Literal[
        "HuggingFaceTokenizer",
        "GPT2BPETokenizer",
        "SentencePieceTokenizer",
        "GPTSentencePieceTokenizer",
        "Llama2Tokenizer",
        "NullTokenizer",
    ] = filled_later()
    """Kind of tokenizer. NullTokenizer splits digits only and needs --vocab-size (mock data)."""

    tokenizer_model: str | None = None
    """Tokenizer file or Hugging Face directory."""

    vocab_file: str | None = None
    """GPT-2 BPE vocabulary (vocab.json)."""

    merge_file: str | None = None
    """GPT-2 BPE merges (merges.txt)."""
