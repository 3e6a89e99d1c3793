"""Saving a run: planned and copied between two iterations, written by threads, finished when all ranks have written.

A checkpoint exists when it is whole: written aside, read back, described by a manifest with sizes and checksums, then
renamed, then the tracker moves. A kill at any moment leaves the previous one in place. With `--async-save` training
goes on while the threads write; without it the ranks wait. They wait by asking each other again and again, never
inside one long collective, so that a slow disk is no communication timeout.
"""

from __future__ import annotations

import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from megatron_let import __version__
from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError, LetError
from megatron_let.log import LOGGER
from megatron_let.mcore.checkpoint import Parts
from megatron_let.mcore.checkpoint_writer import Content, ContentPlanner, Written
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.training import checkpoint_files as files
from megatron_let.training.checkpoints import TokenizerRecord
from megatron_let.training.data_record import DataRecord
from megatron_let.training.let_record import LetRecord
from megatron_let.training.save_directory import DirectoryWatch
from megatron_let.training.state import TrainingState

SETTINGS_FILE = "settings.yaml"
# Beside the tensors: settings, metadata, the ends of files. A guess on the safe side.
_MARGIN_BYTES = 16 << 20
_ASK_SECONDS = (0.005, 0.25)
_PATIENCE_SECONDS = 60.0
"""How long what another machine has written may take to be seen on a network file system."""
_VERSIONS = ("torch", "megatron-core", "numpy", "transformers", "transformer-engine")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunRecord:
    """What a checkpoint says of its run beside weights and counters."""

    let_record: LetRecord | None
    data_record: DataRecord
    choices: list[str]
    """What the run settled for where its settings left it open, in words."""
    tokenizer: TokenizerRecord


class CheckpointSaver:
    """Writes the checkpoints of one run, one at a time."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        parts: Parts,
        record: RunRecord,
        *,
        started_from: int,
    ) -> None:
        """Save `parts`; the checkpoint of iteration `started_from`, where the run began, is never deleted."""
        assert config.checkpoint.save is not None, "saving was asked for"
        self._started_from = started_from
        self._config = config
        self._context = context
        self._record = record
        self._parts = replace(parts, with_rng=not config.checkpoint.no_save_rng)
        if config.checkpoint.no_save_optim:
            self._parts = replace(self._parts, optimizer=None, scheduler=None)
        self._root = Path(config.checkpoint.save)
        self._watch = DirectoryWatch(self._root) if context.rank == 0 else None
        self._planner = ContentPlanner(context)
        self._pending: Iterator[None] | None = None

    def begin(self, state: TrainingState) -> None:
        """Plan and copy the checkpoint of the current iteration and start to write it; every rank calls this.

        A save that is still being written is waited for. Parameters that are sharded must have been gathered.

        Raises:
            LetError: there is no room for it, or the one before could not be written.
            ConfigError: the directory is no longer the one that the run began with.
        """
        self.wait()
        self._context.raise_together(self._failure(None))
        started = time.monotonic()
        iteration, directory = state.iteration, files.partial_directory(self._root, state.iteration)
        run = {
            "version": __version__,
            "versions": _versions(),
            "state": self._context.from_rank_0(asdict(state)),
            "config": self._config.to_dict(),
            "let": None if self._record.let_record is None else self._record.let_record.to_dict(),
            "data": self._record.data_record.to_dict(),
            "vocab_size": self._record.tokenizer.vocab_size,
            "tokenizer_fingerprint": self._record.tokenizer.fingerprint,
            "encoding_fingerprint": self._record.tokenizer.encoding_fingerprint,
        }
        for _ in self._on_rank_0(lambda: files.prepare_partial(self._root, iteration), iteration):
            time.sleep(_ASK_SECONDS[0])
        content = self._planner.plan(directory, self._parts, iteration=iteration, run=run)
        needed = sum(self._context.gather(content.num_bytes)) + _MARGIN_BYTES
        self._context.on_rank_0(lambda: self._require_space(directory, needed))
        content.copy()
        self._pending = self._write(content, iteration, started)
        next(self._pending)

    def poll(self) -> None:
        """Look whether the save in the background has come further, and finish it; every rank calls this.

        Raises:
            LetError: it could not be written; the previous checkpoint is untouched.
        """
        if self._pending is None:
            return
        try:
            if next(self._pending, self) is self:
                self._pending = None
        except LetError:
            self._pending = None
            raise

    def wait(self) -> None:
        """Finish the save in the background, if there is one; every rank calls this. Raises LetError as `poll` does."""
        pause, longest = _ASK_SECONDS
        self.poll()
        while self._pending is not None:
            time.sleep(pause)
            pause = min(2 * pause, longest)
            self.poll()

    def _write(self, content: Content, iteration: int, started: float) -> Iterator[None]:
        """Go through a save, yielding whenever some rank is not yet done."""
        stalled = time.monotonic() - started
        writing = _Task(content.write)
        yield
        yield from self._until_all_are_done(writing, iteration)
        written = self._context.gather(writing.result())
        deleted: list[int] = []
        yield from self._on_rank_0(
            lambda: deleted.extend(self._finish(content, written, iteration)), iteration
        )
        background = (
            f", training stood still for {stalled:.2f} s" if self._config.checkpoint.async_save else ""
        )
        LOGGER.info(
            f" saved checkpoint of iteration {iteration} to {self._root} in {time.monotonic() - started:.1f} s{background}"
        )
        if deleted:
            LOGGER.info(f" deleted the checkpoints of iteration {', '.join(map(str, deleted))}")

    def _finish(self, content: Content, written: list[Written], iteration: int) -> list[int]:
        """Make the checkpoint whole; return the iterations whose checkpoints were deleted."""
        directory = files.partial_directory(self._root, iteration)
        _require_all_files(directory, written)
        content.finish([part.results for part in written])
        comments = "".join(f"# {choice}\n" for choice in ["what was left open:", *self._record.choices])
        (directory / SETTINGS_FILE).write_text(self._config.to_yaml() + comments, encoding="utf-8")
        known = {name: entry for part in written for name, entry in part.files.items()}
        files.finish(self._root, iteration, files.describe_files(directory, known=known))
        options = self._config.checkpoint
        if options.save_keep_last is None and options.save_retain_interval is None:
            return []
        try:
            return files.delete_older(
                self._root,
                keep_last=options.save_keep_last or 2,
                retain_interval=options.save_retain_interval,
                spared=(iteration, self._started_from),
            )
        except OSError as problem:  # the new one is whole: nothing to end a run for
            LOGGER.warning(
                f"an old checkpoint in {self._root} cannot be deleted ({problem.strerror or problem}); the next save tries "
                "again"
            )
            return []

    def _on_rank_0(self, action: Callable[[], object], iteration: int) -> Iterator[None]:
        """Run a file operation on rank 0, yielding until it is done; all raise together when it fails."""
        yield from self._until_all_are_done(
            _Task(action if self._context.rank == 0 else lambda: None), iteration
        )

    def _until_all_are_done(self, task: _Task[Any], iteration: int) -> Iterator[None]:
        while self._context.any_rank(not task.is_done):
            yield
        error = task.error
        if error is not None and not isinstance(error, OSError):
            raise error  # a defect: this rank's traceback tells it
        if not self._context.any_rank(error is not None):
            return
        told = self._failure(error)
        if self._context.rank == 0 and not isinstance(told, ConfigError):
            # Its room may be what is missing. Partial checkpoints are never read, so that it may also stay.
            shutil.rmtree(files.partial_directory(self._root, iteration), ignore_errors=True)
        self._context.raise_together(told)

    def _failure(self, error: OSError | None) -> LetError | None:
        """Return what to say of an error, if there is one; that the directory is lost says more than what follows from it."""
        lost = None
        try:
            lost = None if self._watch is None else self._watch.change()
        except OSError as problem:
            error = error or problem
        return lost or (None if error is None else _unwritten(self._root, error.strerror or str(error)))

    def _require_space(self, directory: Path, needed: int) -> None:
        try:
            free = shutil.disk_usage(self._root).free
        except OSError as problem:
            raise _unwritten(self._root, problem.strerror or str(problem)) from problem
        if free < needed:
            shutil.rmtree(directory, ignore_errors=True)
            raise LetError(
                f"cannot write a checkpoint to {self._root}: it takes {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are "
                "free; free space and resume, the previous checkpoint is untouched (--save-keep-last deletes old ones)"
            )


def build_saver(
    config: RunConfig, context: ParallelContext, parts: Parts, record: RunRecord, *, started_from: int
) -> CheckpointSaver | None:
    """Return the saver of a run that began at iteration `started_from`, None without `--save`; every rank calls this."""
    if config.checkpoint.save is None:
        return None
    return CheckpointSaver(config, context, parts, record, started_from=started_from)


class _Task(Generic[Result]):
    """An action in a thread of its own."""

    def __init__(self, action: Callable[[], Result]) -> None:
        self._results: list[Result] = []
        self.error: Exception | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Return whether the action has ended, well or not."""
        return not self._thread.is_alive()

    def result(self) -> Result:
        """Return what the action gave; only after it has ended well."""
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except Exception as error:
            self.error = error


def _require_all_files(directory: Path, written: list[Written]) -> None:
    """Raise OSError unless rank 0 has in its place what each rank has written: all must share that directory."""
    for rank, part in enumerate(written):
        for name, entry in part.files.items():
            if not files.wait_for_file(directory / name, entry, seconds=_PATIENCE_SECONDS):
                raise OSError(
                    f"{name}, which rank {rank} on {part.host} has written, is not there for rank 0 on "
                    f"{socket.gethostname()}: all nodes must share that directory"
                )


def _unwritten(root: Path, why: str) -> LetError:
    return LetError(
        f"cannot write a checkpoint to {root}: {why}; free space or fix the directory and resume, the previous checkpoint "
        "is untouched"
    )


def _versions() -> dict[str, str]:
    """Return the versions of what decides over the numbers, as far as it is installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
