"""Can the run save where it is told to? Asked at the start, so that no work is lost at the first checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_let.config.run_config import RunConfig
from megatron_let.errors import ConfigError
from megatron_let.mcore.parallel import ParallelContext
from megatron_let.training.checkpoint_files import saved_iterations


def check_save_directory(config: RunConfig, context: ParallelContext) -> None:
    """Make the `--save` directory and write a file into it; every rank calls this.

    A directory that holds another run is refused: its checkpoints would be mixed with this run's, and a resume takes
    what the tracker names.

    Raises:
        ConfigError: it cannot be made or written to, is the teacher's, or holds the checkpoints of another run.
    """
    if config.checkpoint.save is None:
        return
    root = Path(config.checkpoint.save)
    context.on_rank_0(lambda: _check_content(config, root))
    context.on_rank_0(lambda: _check_writing(root))
    context.together(lambda: _check_access(root))


def _check_content(config: RunConfig, root: Path) -> None:
    teacher, load = config.let.let_teacher_load, config.checkpoint.load
    if teacher is not None and _is_same(teacher, root):
        raise ConfigError(f"--save {root} is the teacher's directory; give the run a directory of its own")
    iterations = saved_iterations(root)
    if not iterations:
        return
    holds = f"--save {root} already holds the checkpoint of iteration {iterations[0]}"
    if load is None or not _is_same(load, root):
        raise ConfigError(
            f"{holds}; give --load {root} to go on with that run, or another directory for a new one"
        )
    if config.checkpoint.finetune:
        raise ConfigError(
            f"{holds} and --finetune counts from 0 again; give another --save, or leave out --finetune to resume"
        )


def _is_same(left: str | Path, right: str | Path) -> bool:
    return os.path.realpath(left) == os.path.realpath(right)


def _check_writing(root: Path) -> None:
    """Raise ConfigError unless a file can be written; it is removed again."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write_test.{os.getpid()}"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as problem:
        raise ConfigError(_unwritable(root, problem.strerror or str(problem))) from problem


def _check_access(root: Path) -> None:
    """Raise ConfigError unless this rank, perhaps on another machine than rank 0, sees and may write the directory."""
    root.mkdir(parents=True, exist_ok=True)  # also refreshes what a network file system remembers of it
    if not os.access(root, os.W_OK | os.X_OK):
        raise ConfigError(_unwritable(root, "permission denied"))


def _unwritable(root: Path, why: str) -> str:
    return f"--save {root} cannot be written to ({why}); give a directory that all ranks may write to"
