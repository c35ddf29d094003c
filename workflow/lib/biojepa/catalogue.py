"""The catalogue of public screens: what a user need not write down.

One row per screen in ``resources/catalogue.tsv``. Its columns are those of the table of datasets, and some
that describe the screen to people. It holds published facts alone: a checksum, licence or column that is not
known is empty, and nothing is guessed.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DESCRIPTIONS = ("licence", "reference", "gigabytes", "cells", "unknown", "notes")
"""Columns that no stage reads: terms of use, what to cite, size and number of cells (about; empty where
they are not known), columns of the table of datasets that a user has to fill in, joined by ``;``, and what
to look at."""


@dataclass(frozen=True)
class Entry:
    """One screen of the catalogue.

    Attributes
    ----------
    row
        Column of the table of datasets to value, empty ones left out.
    descriptions
        Column of ``DESCRIPTIONS`` to value.
    """

    row: Mapping[str, str]
    descriptions: Mapping[str, str]

    @property
    def notes(self) -> str:
        """What to look at."""
        return self.descriptions["notes"]

    def merged(self, own: Mapping[str, str], place: str) -> tuple[dict[str, str], str]:
        """Join a row of the user's table of the same name; the user's fields win.

        Parameters
        ----------
        own
            Fields that are filled in; empty where the table has no such row.
        place
            Table and row, for the note.

        Returns
        -------
        tuple
            The row to use, and what to tell the user: nothing where there is no row of that name. A row
            with a ``source`` of its own is another screen, of which the catalogue knows nothing.
        """
        if not own:
            return dict(self.row), ""
        name = self.row["dataset"]
        if "source" in own:
            return dict(own), f"{place}: has a source, so it is used and {name} of the catalogue is not"
        changed = [key for key in own if key in self.row and own[key] != self.row[key]]
        said = f", and {', '.join(changed)} instead of the catalogue's" if changed else ""
        return {**self.row, **own}, f"{place}: has no source, so it is {name} of the catalogue{said}"

    def unknown_in(self, row: Mapping[str, str]) -> list[str]:
        """Columns that are needed, that the catalogue does not know, and that a row lacks."""
        if row.get("source") != self.row["source"]:
            return []
        return [key for key in self.descriptions["unknown"].split(";") if key and not row.get(key)]


def read_catalogue(path: str | Path) -> dict[str, Entry]:
    """Read the catalogue: name of the screen to its entry, in the order of the file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        lines = [line for line in file if not line.startswith("#") and line.strip()]
    entries = {}
    for row in csv.DictReader(lines, delimiter="\t", restval=""):
        described = {key: row.get(key, "") for key in DESCRIPTIONS}
        named = {key: value for key, value in row.items() if key not in DESCRIPTIONS and value}
        entries[named["dataset"]] = Entry(named, described)
    return entries
