"""The launcher: torchrun that ends as its workers ended."""
