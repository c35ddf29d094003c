"""Free space: asked for before anything is written, and running out of it said in words."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from biojepa.errors import InputError

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size_text(n_bytes: float) -> str:
    """Write a number of bytes for people, in powers of 1000 and three digits: ``699 MB``, ``8.80 GB``."""
    power = 0
    while n_bytes >= 1000 and power < len(_UNITS) - 1:
        n_bytes /= 1000
        power += 1
    decimals = 0 if power == 0 or n_bytes >= 100 else 1 if n_bytes >= 10 else 2
    return f"{n_bytes:.{decimals}f} {_UNITS[power]}"


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below a folder."""
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int, what: str) -> None:
    """Stop before the disk is full.

    Parameters
    ----------
    folder
        Folder that will be written to.
    needed
        Bytes still to write.
    what
        Name of what needs them, for the message.

    Raises
    ------
    InputError
        When less is free; says both numbers.
    """
    free = free_bytes(folder)
    if needed > free:
        raise InputError(
            folder,
            f"{size_text(free)} free",
            f"{size_text(needed)} for {what}",
            "free some space, or run in a folder on another disk; the same command then continues",
        )


@contextmanager
def full_disk_named(folder: Path, what: str) -> Iterator[None]:
    """Turn the error of a disk that fills up on the way into a message."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            folder,
            f"{size_text(free_bytes(folder))} free, or no quota left",
            f"room for the rest of {what}",
            "free some space, or run in a folder on another disk; the same command then continues",
        ) from error
