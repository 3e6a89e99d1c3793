"""megatron_let: pretrain a large GPT with a small frozen teacher guiding an early layer (LET, arXiv 2602.05393)."""

__version__ = "0.1.0"
