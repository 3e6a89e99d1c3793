"""Data that are changed while a run reads them are named in one line, and never trained on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_let.errors import ConfigError
from megatron_let.mcore import loading
from megatron_let.mcore.datasets import SampleCounts, build_datasets, microbatches
from megatron_let.mcore.index_cache import CachedGPTDataset
from megatron_let.mcore.loading import require_shared_memory
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.testing.training import TINY_STUDENT, arguments, write_token_files
from megatron_let.training.arguments import parse_arguments
from tests.mcore.test_datasets import Tokenizer

NUM_SAMPLES = 200


@pytest.fixture(params=[0, 1], ids=["without a worker", "in a worker"])
def num_workers(request: pytest.FixtureRequest) -> int:
    """Return how many workers read."""
    return int(request.param)


def config_of(prefix: Path, num_workers: int) -> Any:
    """Return the settings of a run on two data sets, the second of which is to change."""
    still = prefix.with_name("still")
    words = {"--data-path": [still, prefix], "--split": "100,0,0", "--num-workers": num_workers}
    return parse_arguments(arguments(TINY_STUDENT, words))


def built(prefix: Path, num_workers: int, context: ParallelContext) -> tuple[Any, Any]:
    """Write both data sets; return the settings and what is to be read."""
    for path in (prefix, prefix.with_name("still")):
        write_token_files(path, [[*range(60), 60]] * 110)
    config = config_of(prefix, num_workers)
    counts = SampleCounts(train=NUM_SAMPLES, valid=0, test=0)
    return config, build_datasets(config, Tokenizer(), counts, context).train


@pytest.fixture
def read_on(
    tmp_path: Path, one_process: ParallelContext, num_workers: int
) -> tuple[Path, Callable[[], None]]:
    """Return a data set of which a microbatch has been read, and a function that reads all others."""
    prefix = tmp_path / "moving"
    config, data = built(prefix, num_workers, one_process)
    reader = microbatches(data, config, one_process, consumed_samples=0)
    next(reader)

    def read() -> None:
        for _ in reader:
            pass

    return prefix, read


def cut(path: Path) -> None:
    """Cut the file off."""
    os.truncate(path, 0)


def write_into(path: Path) -> None:
    """Put other bytes in place."""
    with path.open("r+b") as stream:
        stream.seek(40)
        stream.write(b"\1\0")


def remove(path: Path) -> None:
    """Remove the file."""
    path.unlink()


CHANGES = {
    "cut": (cut, ".bin", "was changed from 13420 to 0 bytes while the run reads it"),
    "other ids": (write_into, ".bin", "was written to while the run reads it"),
    "another index": (write_into, ".idx", "was written to while the run reads it"),
    "gone": (remove, ".bin", "is gone while the run reads it"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_named_in_one_line(change: str, read_on: tuple[Path, Callable[[], None]]) -> None:
    prefix, read = read_on
    act, suffix, what = CHANGES[change]
    act(Path(f"{prefix}{suffix}"))
    with pytest.raises(ConfigError) as caught:
        read()
    assert str(caught.value).startswith(f"{prefix}{suffix} {what}")
    assert str(caught.value).endswith("; put the files back as they were and resume")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_touched_is_read_on(read_on: tuple[Path, Callable[[], None]]) -> None:
    prefix, read = read_on
    for suffix in (".bin", ".idx"):
        os.utime(f"{prefix}{suffix}")
    read()


def test_a_file_that_is_cut_while_a_worker_reads_it_is_named_though_the_worker_is_killed(
    tmp_path: Path, one_process: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedGPTDataset, "__getitem__", GPTDataset.__getitem__)  # it looked before the cut
    prefix = tmp_path / "moving"
    config, data = built(prefix, 1, one_process)
    cut(Path(f"{prefix}.bin"))
    with pytest.raises(ConfigError, match=rf"{prefix}.bin was changed from 13420 to 0 bytes"):
        list(microbatches(data, config, one_process, consumed_samples=0))


def test_too_little_shared_memory_is_refused_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_shared_memory", lambda: 64 << 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    require_shared_memory(config_of(tmp_path / "x", 0))
    with pytest.raises(
        ConfigError, match=r"^/dev/shm has 0.1 MiB free, and the data loaders of this node's 4 ranks"
    ):
        require_shared_memory(config_of(tmp_path / "x", 2))
