"""One run to a save directory: a lock that ends with the program that holds it, whatever ended that program.

The lock is POSIX's, which belongs to a process: a forked data-loader worker or writer does not inherit it and cannot
keep it, and it works over NFS. (Closing any descriptor of the lock file drops it, so nothing else opens that file
while it is held.) The file stays; who holds it stands in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import socket
import stat
import time
from datetime import datetime
from pathlib import Path

from megatron_let.errors import ConfigError
from megatron_let.log import LOGGER
from megatron_let.regular_files import require_regular

LOCK_FILE = "run.lock"
LOCK_WAIT_SECONDS = 30.0
"""How long a run waits for its predecessor to be gone: a killed one may still be giving its memory back."""
_POLL_SECONDS = 0.25
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class DirectoryInUseError(ConfigError):
    """Another run holds the save directory."""


class DirectoryLock:
    """The hold on a directory; it ends with `release`, with this object, or with the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Let the directory go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        """Let go when nobody refers to this any more."""
        self.release()


def lock_directory(directory: str | os.PathLike[str], *, wait: float = 0.0) -> DirectoryLock | None:
    """Take the lock of an existing directory, waiting up to `wait` seconds for another run to end.

    Returns None where there is nothing to lock: no such directory, or it cannot be written to. On a file system
    without locks it warns and returns a hold that keeps nobody out.

    Raises:
        DirectoryInUseError: another run holds it; the message names that run.
        ConfigError: there is a lock file that this user may not open.
    """
    deadline = time.monotonic() + wait
    is_waiting = False
    while True:
        descriptor = _open(Path(directory, LOCK_FILE))
        if descriptor is None:
            return None
        if _try_lock(descriptor, directory):
            _write_holder(descriptor)
            return DirectoryLock(descriptor)
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another run"
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise DirectoryInUseError(
                f"--save {os.fspath(directory)} is in use by {holder} ({LOCK_FILE} there is locked); wait for the end "
                "of that run, or give another directory"
            )
        if not is_waiting:
            LOGGER.info(
                f"--save {os.fspath(directory)} is held by {holder}; waiting up to {wait:.0f} s for its end"
            )
            is_waiting = True
        time.sleep(_POLL_SECONDS)


def lock_file_of(directory: str | os.PathLike[str]) -> int | None:
    """Return the number of the file that is the lock of a directory (its inode), None when it has none.

    It stays the same as long as its run holds it: a directory that was put in its place, or another run that has taken
    it after the file was deleted, has another. The device's number may change when a network file system is mounted
    again. Raises OSError.
    """
    try:
        return os.stat(Path(directory, LOCK_FILE)).st_ino  # opened and closed, it would be let go
    except (FileNotFoundError, NotADirectoryError):
        return None


def owner_of(path: Path) -> str:
    """Return whose a file or directory is and its mode, in words for a message. Raises OSError."""
    found = path.stat()
    try:
        name = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        name = f"user {found.st_uid}"
    return f"it belongs to {name}, mode {stat.S_IMODE(found.st_mode):o}"


def _open(path: Path) -> int | None:
    """Open (or make) the lock file; None when the directory is not there or takes no files."""
    try:
        if path.exists():
            require_regular(path)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not passed on to programs that are started
    except OSError as problem:
        if problem.errno == errno.EROFS or not os.access(path.parent, os.W_OK) or not path.exists():
            return None
        whose = f": {owner_of(path)}" if problem.errno == errno.EACCES else ""
        raise ConfigError(
            f"{path} cannot be opened ({problem.strerror}{whose}); remove it when no run uses that directory"
        ) from problem


def _try_lock(descriptor: int, directory: str | os.PathLike[str]) -> bool:
    """Lock the open file; return whether it is ours, as it counts to be where there are no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            return False
        LOGGER.warning(
            f"{os.fspath(directory)} is on a file system without locks ({problem.strerror}): nothing keeps a second "
            "run out of it"
        )
    return True


def _write_holder(descriptor: int) -> None:
    """Write who holds the lock; a full disk is found out elsewhere."""
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S%z")
    text = f"pid {os.getpid()} on {socket.gethostname()} since {since}\n"
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError as problem:
        LOGGER.warning(f"{LOCK_FILE} cannot be written ({problem.strerror})")
