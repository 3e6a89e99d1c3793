"""The tiny tokenizers of the tests of `megatron_let.data`, for its programs."""

from tests.data.conftest import backend, tokenizer_directory

__all__ = ["backend", "tokenizer_directory"]
