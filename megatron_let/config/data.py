"""Where the tokens are and how sequences are made of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Preprocessed data sets (.bin/.idx), their split and the loader."""

    data_path: tuple[str, ...] | None = None
    """Prefix of a preprocessed data set, or WEIGHT PREFIX WEIGHT PREFIX ... for a blend."""

    train_data_path: tuple[str, ...] | None = None
    """Like --data-path, for training only."""

    valid_data_path: tuple[str, ...] | None = None
    """Like --data-path, for validation only."""

    test_data_path: tuple[str, ...] | None = None
    """Like --data-path, for testing only."""

    data_args_path: str | None = None
    """File that holds what --data-path would be given, for a blend too long for a command line."""

    per_split_data_args_path: str | None = None
    """JSON file with train, valid and test, each what its --...-data-path would be given: a list or a string."""

    split: str | None = None
    """Shares of training, validation and test, such as 90,5,5. Default with --data-path: 969,30,1."""

    mock_data: bool = False
    """Made-up tokens instead of data, for trying a set-up."""

    data_cache_path: str | None = None
    """Directory for the sample indices that are built on first use. Default: beside the data."""

    mmap_bin_files: bool = True
    """Map .bin files into memory; --no-mmap-bin-files reads them."""

    data_override: bool = False
    """Resume although data, blend, split, seed, sequence length or batch sizes are not those of the checkpoint."""

    num_workers: int = 2
    """Loader processes on each rank; 0 loads in the training process."""

    num_dataset_builder_threads: int = 1
    """Threads that build the data sets of a blend."""

    reset_position_ids: bool = False
    """Start positions again after each end of document."""

    reset_attention_mask: bool = False
    """Keep attention from looking across an end of document."""

    eod_mask_loss: bool = False
    """Leave end-of-document tokens out of the loss."""
