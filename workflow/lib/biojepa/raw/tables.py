"""The tables beside a count matrix, and columns that a screen must have."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from biojepa.errors import InputError

BARCODE, GUIDE, TARGET = "barcode", "guide", "target"


def require_column(table: pd.DataFrame, column: str, where: str | Path, setting: str) -> pd.Series:
    """Return a column, or say which ones there are.

    Parameters
    ----------
    table
        Table that should have the column.
    column
        Its name.
    where
        File the table came from.
    setting
        Key of the dataset table that named the column.

    Raises
    ------
    InputError
        When the column is missing; suggests the closest name.
    """
    if column in table.columns:
        return table[column]
    names = [str(name) for name in table.columns]
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(
        where,
        f"no column {column!r} (columns: {_listed(names)})",
        f"the column named by `{setting}`",
        f"{hint}Set `{setting}` in the dataset table to a column of this file",
    )


def read_table(path: str | Path, setting: str) -> pd.DataFrame:
    """Read a CSV or TSV (by its name, ``.gz`` allowed); only an empty field is missing."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            path,
            "no such file",
            f"the table named by `{setting}`",
            f"correct `{setting}` in the dataset table",
        )
    separator = "\t" if ".tsv" in path.suffixes or ".txt" in path.suffixes else ","
    return pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""], low_memory=False)


def read_cell_metadata(path: str | Path, barcodes: Sequence[str]) -> pd.DataFrame:
    """Read the table of cells in the order of ``barcodes``.

    Returns
    -------
    pandas.DataFrame
        Index ``barcodes``, one column for each column of the table but the barcode.

    Raises
    ------
    InputError
        When a barcode is missing from the table or occurs twice in it.
    """
    table = read_table(path, "cell_metadata")
    key = BARCODE if BARCODE in table.columns else str(table.columns[0])
    index = table[key].astype(str)
    twice = index[index.duplicated()]
    if len(twice):
        raise InputError(
            f"{path}, column {key!r}",
            f"{twice.nunique()} barcodes more than once, such as {twice.iloc[0]!r}",
            "one row per barcode",
            "remove the repeated rows",
        )
    table = table.drop(columns=key).set_index(pd.Index(index, name=None))
    missing = [barcode for barcode in barcodes if barcode not in table.index]
    if missing:
        raise InputError(
            f"{path}, column {key!r}",
            f"{len(missing)} of {len(barcodes)} barcodes of the matrix missing, such as {missing[0]!r} "
            f"(the table has {len(table)}, such as {_listed(list(table.index[:2]))})",
            "a row for every barcode of the matrix",
            "add the rows, or make the two spellings of the barcodes agree",
        )
    return table.loc[list(barcodes)]


def read_guide_table(path: str | Path) -> pd.Series:
    """Read which target each guide has; index guide, values target as the file spells it."""
    table = read_table(path, "guide_table")
    guides = require_column(table, GUIDE, path, "guide_table").astype(str)
    targets = require_column(table, TARGET, path, "guide_table")
    if guides.duplicated().any():
        name = guides[guides.duplicated()].iloc[0]
        raise InputError(
            f"{path}, column guide",
            f"guide {name!r} more than once",
            "one row per guide",
            "remove the repeated rows",
        )
    if targets.isna().any():
        name = guides[targets.isna()].iloc[0]
        raise InputError(
            f"{path}, column target",
            f"no target for guide {name!r}",
            "a gene, or the control label",
            "fill it in",
        )
    return pd.Series(targets.astype(str).to_numpy(), index=guides.to_numpy(), name=TARGET)


def _listed(names: Sequence[str], most: int = 20) -> str:
    """Return names for a message, the first ``most`` of them."""
    shown = ", ".join(repr(str(name)) for name in names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown or "none"
