"""Raw text to token files and back: tokenizers, the .bin/.idx format, manifests. Knows nothing of Megatron."""
