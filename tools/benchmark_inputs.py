"""What runs of `tools/benchmark.py` read: random tokens and a random Hugging Face teacher."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from benchmark_reference import GptShape

from megatron_let.data.indexed_writer import write_pair


def write_random_tokens(prefix: Path, *, num_tokens: int, vocab_size: int) -> None:
    """Write PREFIX.bin and PREFIX.idx: random ids below the end of document, in documents of a thousand."""
    random = np.random.default_rng(1)
    length = 1000
    one = np.ones(1, np.int32).tobytes()
    documents = (
        random.integers(0, vocab_size - 1, length, dtype=np.uint16) for _ in range(-(-num_tokens // length))
    )
    parts = ((ids.tobytes(), np.asarray([length], np.int32).tobytes(), one) for ids in documents)
    write_pair(str(prefix), "uint16", parts)


def write_hf_teacher(directory: Path, shape: GptShape) -> None:
    """Write a random LLaMA-style model of this shape."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_query_groups,
        max_position_embeddings=shape.seq_length,
    )
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
