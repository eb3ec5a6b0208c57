"""Why a file could not be written, and what helps."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TRIAL_BYTES = 1 << 20

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space there, or if there is some (`df -h`), remove files (`df -i`)",
    errno.EDQUOT: "your share of the disk is used up: free some space of yours, or ask for a larger quota",
    errno.EROFS: "the file system is read-only: write somewhere else, or mount it for writing",
    errno.EACCES: "this user may not write there: change the folder's owner or permissions, or write somewhere else",
    errno.EPERM: "this user may not write there, or the file is protected (`lsattr`): write somewhere else",
    errno.EMFILE: "this process has too many files open: raise the limit (`ulimit -n`)",
    errno.ENFILE: "the machine has too many files open: raise its limit (`sysctl fs.file-max`)",
    errno.EFBIG: "a file there may not be so large: raise the limit (`ulimit -f`), or use another file system",
    errno.ESTALE: "the network's file system no longer knows the folder: mount it again",
    errno.EIO: "the disk has failed, or the network's file system: see what the kernel says (`dmesg`)",
    errno.ETIMEDOUT: "the network's file system does not answer: look at its server",
    errno.ENOENT: "the folder is not there, or has been removed meanwhile: leave it to the run",
    errno.ENOTDIR: "a file is where a folder should be: remove it, or write somewhere else",
    errno.ENAMETOOLONG: "the path is too long for the file system: write somewhere else",
}
"""By the number of an error of the operating system."""


def try_to_write(folder: Path) -> None:
    """Write something into a folder, and remove it.

    Raises:
        OSError: It cannot be written.
    """
    with tempfile.NamedTemporaryFile(prefix=".layup-trial-", dir=folder) as file:
        file.write(bytes(_TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def errno_of_writing(folder: Path) -> int | None:
    """The number of the operating system's error that writing there comes to; None if it works."""
    try:
        try_to_write(folder)
    except OSError as error:
        return error.errno
    return None


def why_not_written(error: BaseException, folder: str | Path) -> str:
    """What is wrong, and what helps, as a sentence without its end; nothing if it is none of the operating system's.

    Some libraries say that a file could not be written, and not why. Then it is tried in the folder.

    Args:
        error: What was raised.
        folder: Where something was to be written.
    """
    number = next(filter(None, map(_number_of, _with_causes(error))), None)
    if number is None:
        number = errno_of_writing(nearest(Path(folder).absolute()))
    return remedy(number)


def advice(error: BaseException, folder: str | Path, otherwise: str = "") -> str:
    """The same as the beginning of a sentence; `otherwise` if nothing is known."""
    why = why_not_written(error, folder) or otherwise
    return why[:1].upper() + why[1:]


def remedy(number: int | None) -> str:
    """What helps against an error of the operating system, with what it is; nothing if there is no error."""
    if not number:
        return ""
    return _REMEDIES.get(number) or f"the operating system says: {os.strerror(number)}"


def nearest(path: Path) -> Path:
    """The path, or the nearest one above it that exists, as far as this user can see."""
    while not os.path.exists(path) and path != path.parent:  # `Path.exists` raises where it may not look
        path = path.parent
    return path


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _number_of(error: BaseException) -> int | None:
    """That of the operating system's error, also if a library written in Rust has put it into words."""
    if isinstance(error, OSError):
        return error.errno
    words = re.search(r"\(os error (\d+)\)", str(error))
    return int(words[1]) if words is not None else None
