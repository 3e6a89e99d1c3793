"""A `--save` that cannot be used is found at the start: before data are read and the model is built."""

from __future__ import annotations

import errno
import os
import pwd
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_let.errors import EXIT_DONE, ConfigError
from megatron_let.mcore import parallel
from megatron_let.testing.distributed import RankPool
from megatron_let.testing.training import TINY_STUDENT, arguments
from megatron_let.training import save_directory
from megatron_let.training.dashboards import TensorBoard, WeightsAndBiases
from tests.training.bad_input import Outcome, content_of, outcome, refusal, run

NO_DATA = {"--data-path": "nowhere", "--train-iters": 1}
"""Settings whose data would be the next mistake to be found."""

PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file in its place": (lambda root: root / "file", "File exists"),
    "a file above it": (lambda root: root / "file" / "run", "Not a directory"),
    "a parent that cannot be made": (lambda root: Path("/proc/nowhere/run"), "No such file or directory"),
    "a name too long": (lambda root: root / ("x" * 256), "File name too long"),
    "a link to nowhere": (lambda root: root / "link", "File exists"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_to(place: str, pool: RankPool, tmp_path: Path) -> None:
    where, reason = PLACES[place]
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "far")
    path = where(tmp_path)
    message = refusal(pool, {**NO_DATA, "--save": path}, untouched=tmp_path)
    assert message == (
        f"--save {path} cannot be written to ({reason}); give a directory that all ranks may write to"
    )


def test_the_same_directory_as_save_and_load_changes_nothing(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    path = tmp_path / "file"
    assert "cannot be written to" in refusal(pool, {**NO_DATA, "--save": path, "--load": path})


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system")]
)
def test_a_directory_without_permission(
    number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: str) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ConfigError, match=rf"cannot be written to \({reason}.*\); give") as refused:
        save_directory._write_probe(tmp_path / "run")
    owner = pwd.getpwuid(os.geteuid()).pw_name
    mode = f"{(tmp_path / 'run').stat().st_mode & 0o7777:o}"
    assert (f"it belongs to {owner}, mode {mode}" in str(refused.value)) == (number == errno.EACCES)


def test_a_directory_that_another_machine_may_not_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_directory._check_access(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="Permission denied: it belongs to"):
        save_directory._check_access(tmp_path)


@contextmanager
def chdir(place: Path) -> Iterator[None]:
    """Be in another working directory."""
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def refusal_elsewhere(places: list[Path], patience: float, argv: list[str]) -> str | None:
    """Run the program from this rank's own working directory; return the message it is refused with."""
    with chdir(places[int(os.environ["RANK"])]), patch.object(save_directory, "_PATIENCE_SECONDS", patience):
        return outcome(argv).message


def test_a_directory_that_is_not_the_same_for_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    """A relative path from two working directories is to the program what a disk of each node is."""
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    words = {"--mock-data": None, "--train-iters": 1, "--save": "run"}
    argv, host = arguments(TINY_STUDENT, words), socket.gethostname()
    messages = pool.run(2, refusal_elsewhere, places, 0.5, argv)
    message = (
        f"--save run is not one directory for all ranks: what was written to {places[0] / 'run'} (rank 0 on {host}) is "
        f"not in {places[1] / 'run'} (rank 1 on {host}); give a directory that all nodes share"
    )
    assert messages == [message] * 2
    assert list(content_of(tmp_path)) == ["first", "first/run", "second"]
    (places[1] / "run").symlink_to(places[0] / "run")
    assert pool.run(2, refusal_elsewhere, places, 0.5, argv) == ["", ""]
    assert not list(tmp_path.rglob(".write_test*"))


def test_a_directory_of_another_run_is_not_written_into(
    pool: RankPool, start: Path, token_files: Path, tmp_path: Path
) -> None:
    words = {"--data-path": token_files, "--train-iters": 3}
    holds = f"--save {start} already holds the checkpoint of iteration 2"
    message = refusal(pool, {**words, "--save": start}, untouched=start)
    assert message.startswith(f"{holds}; give --load {start} to go on with that run")
    message = refusal(pool, {**words, "--save": start, "--load": tmp_path}, untouched=start)
    assert message.startswith(f"{holds}; give --load {start}")
    message = refusal(pool, {**words, "--save": start, "--load": start, "--finetune": None}, untouched=start)
    assert message.startswith(f"{holds} and --finetune counts from 0 again; give another --save")


def test_a_directory_in_which_a_run_ended_before_its_first_checkpoint_is_free(
    pool: RankPool, token_files: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 4.0}\n')
    (tmp_path / "iter_0000001.partial").mkdir()
    (tmp_path / "exit_status.json").write_text("{}")
    words: dict[str, Any] = {"--data-path": token_files, "--train-iters": 1, "--save": tmp_path}
    assert run(pool, words, world_size=1).code == EXIT_DONE


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(parallel.torch.cuda, "set_device", lambda index: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 ranks were started on a machine with 2 visible GPUs"):
        parallel._select_device("nccl")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert str(parallel._select_device("nccl")) == "cuda:0"


def test_logs_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    from megatron_let.config.logging import LoggingConfig

    class Error(Exception):
        pass

    def init(**_: object) -> None:
        raise Error("api_key not configured\n(no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Error=Error, init=init))
    with pytest.raises(ConfigError, match=r"--wandb-project p: api_key not configured \(no-tty\); or set"):
        WeightsAndBiases(LoggingConfig(wandb_project="p"), {})

    def writer(directory: str, *, purge_step: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", directory)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    with pytest.raises(ConfigError, match="--tensorboard-dir /x: Permission denied"):
        TensorBoard("/x")


def train_by_rank(changes: list[dict[str, Any]]) -> Outcome:
    """Run the tiny student with the changes of this rank."""
    return outcome(arguments(TINY_STUDENT, changes[int(os.environ["RANK"])]))


def test_ranks_that_were_started_with_different_settings(pool: RankPool, tmp_path: Path) -> None:
    base = {"--mock-data": None, "--train-iters": 1}
    apart = [base, {**base, "--tensor-model-parallel-size": 2, "--lr": 1e-4}]
    outcomes = pool.run(2, train_by_rank, apart)
    assert len({each.message for each in outcomes}) == 1
    assert outcomes[0].message.startswith("rank 1 was started with other settings than rank 0: ")
    assert "tensor_model_parallel_size 2 (rank 0: 1), lr 0.0001 (rank 0: 0.003)" in outcomes[0].message
    alike = [{**base, "--tensorboard-dir": tmp_path / str(rank)} for rank in (0, 1)]
    assert [each.code for each in pool.run(2, train_by_rank, alike)] == [EXIT_DONE, EXIT_DONE]
