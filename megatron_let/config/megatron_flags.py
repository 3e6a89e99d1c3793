"""Megatron-LM's flags that are not ours (milestone 1: placeholder)."""
