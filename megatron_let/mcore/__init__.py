"""Everything that touches megatron-core: the only package of this project that imports it."""
