"""The one way to read a file that anybody may have put there: regular files alone, and small ones no larger than a limit.

A FIFO blocks whoever opens it, a device may give bytes without end, and a file as large as the disk takes all memory.
All of them are an OSError here, with the path and the reason, as a missing file is one.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MIB = 1 << 20
LARGEST_SMALL_FILE = 256 * MIB

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def require_regular(path: str | os.PathLike[str], *, limit: int | None = None) -> None:
    """Refuse a path that another library is about to open, unless it is a regular file of at most `limit` bytes.

    Raises:
        OSError: it is not, or is not there.
    """
    _check(os.stat(path), path, limit)


def require_regular_files(directory: str | os.PathLike[str], *, suffixes: tuple[str, ...]) -> None:
    """Do the same for every small file of a directory whose name ends so; links are followed.

    Raises:
        OSError: as require_regular.
    """
    for name in sorted(os.listdir(directory)):
        path = Path(directory, name)
        if name.endswith(suffixes) and path.exists() and not path.is_dir():
            require_regular(path, limit=LARGEST_SMALL_FILE)


def open_regular(path: str | os.PathLike[str], *, limit: int | None = None) -> BinaryIO:
    """Open a regular file of at most `limit` bytes (None: any size) for reading; it never waits for a writer.

    Raises:
        OSError: as require_regular.
    """
    require_regular(path, limit=limit)  # before it is opened, which a device may notice
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(os.fstat(descriptor), path, limit)  # what was opened, should it have been replaced meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike[str], *, limit: int = LARGEST_SMALL_FILE) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: as require_regular.
    """
    with open_regular(path, limit=limit) as stream:
        content = stream.read(limit + 1)  # the size that the system states is not always the truth
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def read_text(
    path: str | os.PathLike[str], *, errors: str = "strict", limit: int = LARGEST_SMALL_FILE
) -> str:
    """Return the same as UTF-8 text, with the line ends as "\\n".

    Raises:
        OSError: as require_regular.
        UnicodeDecodeError: it is no UTF-8, and `errors` is strict.
    """
    text = read_bytes(path, limit=limit).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check(found: os.stat_result, path: str | os.PathLike[str], limit: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(found.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
    if limit is not None and found.st_size > limit:
        raise _too_large(path, limit)


def _too_large(path: str | os.PathLike[str], limit: int) -> OSError:
    return OSError(
        errno.EFBIG, f"it is larger than {limit // MIB} MiB, which no such file is", os.fspath(path)
    )
