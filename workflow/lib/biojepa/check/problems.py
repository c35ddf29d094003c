"""Collect problems in place of stopping at the first one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from biojepa.errors import InputError, StoppedRun
from biojepa.raw.parts import DAMAGE

# What damaged files make readers raise, beside the errors that are meant for users.
READING_ERRORS = (OSError, *DAMAGE, EOFError, zlib.error)


class Problems:
    """What is wrong, each thing once, in the order found.

    Attributes
    ----------
    found
        One sentence each, with the dataset in front where it is about one.
    missing
        Files that are known to be missing: that a reader misses one is no problem of its own.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.missing: set[str] = set()

    def add(self, problem: str, dataset: str = "") -> None:
        """Add one, unless it is there."""
        text = f"{dataset}: {problem}" if dataset else problem
        if text not in self.found:
            self.found.append(text)

    @contextmanager
    def caught(self, dataset: str, what: str) -> Iterator[None]:
        """Turn an error in the block into a problem; ``what`` was read, where the error does not say so."""
        try:
            yield
        except (InputError, StoppedRun) as error:
            if getattr(error, "where", None) not in self.missing:
                self.add(str(error), dataset)
        except READING_ERRORS as error:
            self.add(f"{what}: cannot be read ({type(error).__name__}: {error})", dataset)
