"""What every reader of a format takes and returns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import pandas as pd

from biojepa.errors import InputError, StoppedRun
from biojepa.raw.matrix import CompressedRows, Entries, RowBlocks, rows_from_entries

log = logging.getLogger(__name__)

# What h5py and anndata raise, beside OSError, where a part of a file is missing or of another kind.
DAMAGE = (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError)


@dataclass
class Parts:
    """A screen as its file has it.

    Parameters
    ----------
    counts
        ``(cells, features)``.
    obs, var
        Tables of cells and of features.
    notes
        What had to be decided on the way.
    """

    counts: RowBlocks
    obs: pd.DataFrame
    var: pd.DataFrame
    notes: list[str] = field(default_factory=list)


@dataclass
class Reading:
    """How large matrices are read: what is closed at the end, where temporary files go, sizes of blocks.

    With ``tables_only``, readers look at no value of a matrix and return its shape.
    """

    stack: ExitStack
    scratch: str | Path | None = None
    entries: int | None = None
    most: int | None = None
    tables_only: bool = False

    def in_rows(
        self, entries: Iterator[Entries], n_entries: int, shape: tuple[int, int], where: Path
    ) -> CompressedRows:
        """Put entries in any order into rows."""
        return rows_from_entries(
            entries, n_entries, shape, self.stack, self.scratch, where, self.most, self.entries
        )


def open_hdf5(path: Path, how: Reading) -> h5py.File:
    """Open an HDF5 file until the reading ends.

    Raises
    ------
    InputError
        When it is empty, cut off, or no HDF5.
    """
    if not path.stat().st_size:
        raise InputError(path, "an empty file", "a complete HDF5 file", "delete it and download it again")
    try:
        return how.stack.enter_context(h5py.File(path))
    except OSError as error:
        raise InputError(
            path,
            f"a file that HDF5 cannot open ({error})",
            "a complete HDF5 file",
            "delete it and download it again",
        ) from error


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turn what HDF5 says of a damaged file into a message for its user.

    Raises
    ------
    InputError
        When a part cannot be unpacked, is missing, or is of another kind than it should be.
    """
    try:
        yield
    except (InputError, StoppedRun):
        raise
    except (OSError, *DAMAGE) as error:
        if isinstance(error, OSError) and (isinstance(error, FileNotFoundError) or error.errno is not None):
            raise
        by_hdf5 = isinstance(error, OSError)
        # The same errors could be a mistake of this reader, and then their place is what helps: in the log of
        # the job, which has what is said from this level on, and not on the terminal.
        log.info("reading %s", path, exc_info=error)
        raise InputError(
            path,
            f"a part that HDF5 cannot read ({error})"
            if by_hdf5
            else f"a part that cannot be read ({type(error).__name__}: {error})",
            "a complete file",
            "fetch it again; if anndata or another HDF5 tool reads it, please report this message",
        ) from error
