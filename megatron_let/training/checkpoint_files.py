"""Checkpoint directories: names, the tracker file, the manifest that tells a whole checkpoint from a damaged one.

SAVE/latest_checkpointed_iteration.txt    the tracker: the iteration that a run goes on from
SAVE/iter_0000100/                        a whole checkpoint: megatron-core's files and manifest.json
SAVE/iter_0000100.partial/                one whose save did not finish; never read
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from megatron_let.data.digests import sha256_of
from megatron_let.errors import ConfigError
from megatron_let.plain_json import fits, read_json
from megatron_let.regular_files import open_regular, read_text

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(r"iter_\d{7,}(\.old(\.\d+)?)?\.partial")
_POLL_SECONDS = 0.25
FileEntry = dict[str, object]
"""`bytes` and `sha256` of a file."""
_NOTHING: Mapping[str, FileEntry] = MappingProxyType({})


def iteration_directory(root: Path, iteration: int) -> Path:
    """Return `root/iter_0000100` for iteration 100."""
    return root / f"iter_{iteration:07d}"


def partial_directory(root: Path, iteration: int) -> Path:
    """Return the directory a checkpoint is written into before it is whole."""
    return root / f"iter_{iteration:07d}{_PARTIAL}"


def saved_iterations(root: Path) -> list[int]:
    """Return the iterations that have a checkpoint directory under `root`, newest first; partial ones left out."""
    if not os.path.isdir(root):
        return []
    matches = (re.fullmatch(r"iter_(\d{7,})", entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted((int(match.group(1)) for match in matches if match), reverse=True)


def in_order_of_saving(root: Path) -> list[int]:
    """Return the same, the one saved last first: after a rollback that is not the one with the highest number."""
    return sorted(
        saved_iterations(root),
        key=lambda iteration: (_saved_at(iteration_directory(root, iteration)), iteration),
        reverse=True,
    )


def _saved_at(directory: Path) -> int:
    """Return when a checkpoint was saved, in nanoseconds since the epoch; 0 where its manifest does not tell."""
    try:
        saved = read_json(directory / MANIFEST)["saved"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return int(saved) if fits(saved, int) else 0


def resume_order(root: Path) -> list[int]:
    """Return the iterations under `root` as a resume tries them: the tracker's, those that led to it, the others.

    What a rollback has left behind has a higher number than something that was saved after it.
    """
    saved, named = in_order_of_saving(root), read_tracker(root)
    branch: list[int] = []
    for iteration in saved if named not in saved else [named, *saved]:
        if not branch or iteration < branch[-1]:
            branch.append(iteration)
    return branch + [iteration for iteration in saved if iteration not in branch]


def newest_iteration_directory(root: Path) -> Path:
    """Return the directory of the checkpoint under `root` that a run would go on from.

    Raises:
        ConfigError: there is none.
    """
    iterations = resume_order(root)
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
        text = read_text(root / TRACKER).strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if re.fullmatch(r"\d{1,30}", text) else None


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
    """Create the empty directory the next checkpoint is written into; what stopped saves and deletions left is removed.

    Nobody else writes here: the run holds the lock of its save directory. Names that no save gives are somebody's. What
    cannot be removed now (a network file system keeps what is still open) is left for the next time.
    """
    for entry in root.glob(f"iter_*{_PARTIAL}"):
        if _PARTIAL_NAME.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
    directory = partial_directory(root, iteration)
    directory.mkdir(parents=True)
    return directory


def describe_files(directory: Path, *, known: Mapping[str, FileEntry] = _NOTHING) -> dict[str, FileEntry]:
    """Return size and SHA-256 of each file of a checkpoint; those that are `known` are not read again."""
    found = {entry.name for entry in directory.iterdir() if entry.is_file() and entry.name != MANIFEST}
    names = sorted(found | known.keys())
    return {name: known[name] if name in known else _describe(directory / name) for name in names}


def _describe(path: Path) -> FileEntry:
    with open_regular(path) as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def wait_for_file(path: Path, entry: FileEntry, *, seconds: float) -> bool:
    """Return whether a file that another machine may have written is there at its full size; it may take a while."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if path.stat().st_size == entry["bytes"]:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)


def finish(root: Path, iteration: int, files: Mapping[str, FileEntry]) -> None:
    """Make a written checkpoint whole and the newest: manifest, rename, then the tracker moves."""
    directory = partial_directory(root, iteration)
    content = {"format": 1, "saved": time.time_ns(), "files": dict(sorted(files.items()))}
    text = json.dumps(content, indent=1)
    write_atomically(directory / MANIFEST, text + "\n")
    _sync_directory(directory)
    final = iteration_directory(root, iteration)
    replaced = _set_aside(final) if final.exists() else None
    directory.rename(final)
    _sync_directory(root)
    write_tracker(root, iteration)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def delete_older(
    root: Path, *, keep_last: int, retain_interval: int | None, spared: Collection[int] = ()
) -> list[int]:
    """Delete whole checkpoints and return which.

    What stays: the `keep_last` that were saved last, those at multiples of `retain_interval`, and the `spared` ones.
    Each gets another name first, so that a stop in the middle leaves no damaged checkpoint. One that is damaged as
    far as sizes tell does not count among those that are kept, and stays: somebody may want to look at it.
    """
    whole = [
        iteration
        for iteration in in_order_of_saving(root)
        if find_damage(iteration_directory(root, iteration), sizes_only=True) is None
    ]
    old = [
        iteration
        for iteration in whole[keep_last:]
        if iteration not in spared and (not retain_interval or iteration % retain_interval)
    ]
    for iteration in old:
        shutil.rmtree(_set_aside(iteration_directory(root, iteration)))
    return old


def _set_aside(directory: Path) -> Path:
    """Give a checkpoint a name under which it is never read, and return that."""
    aside = directory.with_name(f"{directory.name}.old.{time.time_ns()}{_PARTIAL}")
    directory.rename(aside)
    return aside


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(directory: Path, *, share: tuple[int, int] = (0, 1), sizes_only: bool = False) -> str | None:
    """Return what is wrong with a checkpoint in words, or None when it is whole.

    Every file is checked against the manifest by size and checksum; with `share` = (rank, world size) each rank
    checks every n-th file, so that ranks verify in parallel. `sizes_only` reads no file but the manifest.
    """
    try:
        files = read_json(directory / MANIFEST)["files"]
        expected = [(name, int(files[name]["bytes"]), str(files[name]["sha256"])) for name in sorted(files)]
        if not expected or not all(map(_is_file_name, files)):
            raise ValueError("a checkpoint has files, in its own directory")
    except FileNotFoundError:
        return f"{MANIFEST} is missing (not written by megatron_let, or not to its end)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    rank, world_size = share
    return _first(
        _file_damage(directory / name, size, None if sizes_only else digest)
        for name, size, digest in expected[rank::world_size]
    )


def _is_file_name(name: str) -> bool:
    """Return whether a name is one that a save gives to a file of a checkpoint."""
    return re.fullmatch(r"[A-Za-z0-9_.-]{1,255}", name) is not None and name not in (".", "..")


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _file_damage(path: Path, size: int, digest: str | None) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"{path.name} has {actual} bytes instead of {size}"
        is_same = digest is None or sha256_of(path) == digest
        return None if is_same else f"{path.name} does not match its checksum"
    except OSError as problem:
        return f"{path.name} cannot be read ({problem.strerror or problem})"
