"""Checkpoint directories: names, the tracker file, the manifest that tells a whole checkpoint from a damaged one.

SAVE/latest_checkpointed_iteration.txt    the newest iteration saved
SAVE/iter_0000100/                        a whole checkpoint: megatron-core's files and manifest.json
SAVE/iter_0000100.partial/                one whose save did not finish; never read
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_let.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
_BLOCK = 1 << 22


def iteration_directory(root: Path, iteration: int) -> Path:
    """Return `root/iter_0000100` for iteration 100."""
    return root / f"iter_{iteration:07d}"


def partial_directory(root: Path, iteration: int) -> Path:
    """Return the directory a checkpoint is written into before it is whole."""
    return root / f"iter_{iteration:07d}.partial"


def saved_iterations(root: Path) -> list[int]:
    """Return the iterations that have a checkpoint directory under `root`, newest first; partial ones left out."""
    if not os.path.isdir(root):
        return []
    matches = (re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted((int(match.group(1)) for match in matches if match), reverse=True)


def newest_iteration_directory(root: Path) -> Path:
    """Return the directory of the newest checkpoint under `root`.

    Raises:
        ConfigError: there is none.
    """
    iterations = saved_iterations(root)
    if not iterations:
        raise ConfigError(f"{root} holds no checkpoint (a directory iter_0000100 or the like){hint_at(root)}")
    return iteration_directory(root, iterations[0])


def hint_at(root: Path) -> str:
    """Return what to give instead of a path that is one checkpoint, or a file; nothing for any other."""
    if re.fullmatch(r"iter_\d{7,}", root.absolute().name) and os.path.isdir(root):
        return f"; it looks like one checkpoint: give the directory above it, {root.absolute().parent}"
    return "; it is a file: give a directory" if os.path.isfile(root) else ""


def read_tracker(root: Path) -> int | None:
    """Return the iteration the tracker names, or None when there is no tracker or it does not hold a number."""
    try:
        text = (root / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def write_tracker(root: Path, iteration: int) -> None:
    """Point the tracker at `iteration`, atomically."""
    write_atomically(root / TRACKER, f"{iteration}\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace the contents of `path` so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def prepare_partial(root: Path, iteration: int) -> Path:
    """Create the empty directory the next checkpoint is written into; what an earlier attempt left is removed."""
    directory = partial_directory(root, iteration)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe_files(directory: Path, *, share: tuple[int, int] = (0, 1)) -> dict[str, dict[str, object]]:
    """Return size and SHA-256 of each file of a checkpoint; `share` = (rank, world size) takes every n-th file."""
    rank, world_size = share
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file() and entry.name != MANIFEST)
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": checksum(directory / name)}
        for name in names[rank::world_size]
    }


def finish(root: Path, iteration: int, files: dict[str, dict[str, object]]) -> None:
    """Make a written checkpoint whole and the newest: manifest, rename, then the tracker moves."""
    directory = partial_directory(root, iteration)
    text = json.dumps({"format": 1, "files": dict(sorted(files.items()))}, indent=1)
    write_atomically(directory / MANIFEST, text + "\n")
    final = iteration_directory(root, iteration)
    if final.exists():
        shutil.rmtree(final)
    directory.rename(final)
    write_tracker(root, iteration)


def find_damage(directory: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return what is wrong with a checkpoint in words, or None when it is whole.

    Every file is checked against the manifest by size and checksum; with `share` = (rank, world size) each rank
    checks every n-th file, so that ranks verify in parallel.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        expected = [(name, int(files[name]["bytes"]), str(files[name]["sha256"])) for name in sorted(files)]
        if not expected or any(name != os.path.basename(name) for name in files):
            raise ValueError("a checkpoint has files, in its own directory")
    except FileNotFoundError:
        return f"{MANIFEST} is missing (not written by megatron_let, or not to its end)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    rank, world_size = share
    return _first(
        _file_damage(directory / name, size, digest) for name, size, digest in expected[rank::world_size]
    )


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _file_damage(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"{path.name} has {actual} bytes instead of {size}"
        return None if checksum(path) == digest else f"{path.name} does not match its checksum"
    except OSError as problem:
        return f"{path.name} cannot be read ({problem.strerror or problem})"
