"""The exceptions that a user is meant to read."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """A file, table or setting that the pipeline cannot use, and what to do about it.

    Parameters
    ----------
    where
        File, with row, column or key where known.
    found
        What is there.
    expected
        What should be there.
    fix
        One sentence: what to change.
    """

    def __init__(self, where: str | Path, found: str, expected: str, fix: str) -> None:
        self.where, self.found, self.expected, self.fix = str(where), found, expected, fix
        super().__init__(f"{where}: found {found}; expected {expected}. Fix: {fix}")

    def __reduce__(self) -> tuple:
        """Keep the four parts when the error crosses a process boundary."""
        return (type(self), (self.where, self.found, self.expected, self.fix))


class StoppedRun(RuntimeError):  # noqa: N818 - names what happened, as KeyboardInterrupt does
    """A run that stopped itself because its result would mislead; the message says why and what to change."""
