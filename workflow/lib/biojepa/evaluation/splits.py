"""Read the frozen split of a fold and refuse one that was changed or does not fit the cells."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from biojepa.contracts import (
    CATEGORIES,
    CATEGORY,
    CONTROL,
    LEFT_OUT,
    PERTURBATION,
    SET,
    SETS,
    SPLIT_COLUMNS,
    TEST,
    TRAIN,
)
from biojepa.errors import InputError
from biojepa.files import read_tsv, sha256_of
from biojepa.splits import cell_labels

_REMAKE = "remake the split with the pair stage; never edit split.tsv by hand"


@dataclass(frozen=True)
class FoldSplit:
    """What is held out in one fold, as frozen by the pair stage.

    Attributes
    ----------
    fold
        Number of the fold.
    table
        One row per perturbation, indexed by it: ``set``, ``category``, ``n_genes_seen``.
    path
        File that the table came from.
    info
        Content of ``split.json``.
    """

    fold: int
    table: pd.DataFrame
    path: Path
    info: dict[str, Any] = field(default_factory=dict)

    def labels(self, which: str) -> list[str]:
        """Return the perturbations of one set, sorted."""
        return sorted(self.table.index[self.table[SET] == which])


def read_split(path: str | Path, info_path: str | Path, fold: int) -> FoldSplit:
    """Read ``split.tsv`` and check it against the checksum in ``split.json``.

    Raises
    ------
    InputError
        If the table was changed after it was frozen, belongs to another fold, or is malformed.
    """
    path, info_path = Path(path), Path(info_path)
    info = json.loads(info_path.read_text(encoding="utf-8"))
    expected, found = info.get("sha256"), sha256_of(path)
    if expected != found:
        raise InputError(
            path,
            f"SHA-256 {found}",
            f"{expected}, frozen in {info_path}",
            f"the split was changed: {_REMAKE}",
        )
    if int(info.get("fold", fold)) != int(fold):
        raise InputError(
            info_path, f"fold {info['fold']}", f"fold {fold}", "pass the files of one fold together"
        )
    table = read_tsv(path, dtype={PERTURBATION: str, SET: str, CATEGORY: str})
    check_split_table(table, path)
    return FoldSplit(int(fold), table.set_index(PERTURBATION), path, info)


def check_split_table(table: pd.DataFrame, path: str | Path) -> None:
    """Raise an InputError if a split table lacks a column or holds an impossible row."""
    missing = [column for column in SPLIT_COLUMNS if column not in table]
    if missing:
        raise InputError(path, f"columns {list(table)}", f"also {missing}", _REMAKE)
    twice = sorted(set(table.loc[table[PERTURBATION].duplicated(), PERTURBATION]))
    if twice:
        raise InputError(
            path, f"perturbation {twice[0]!r} twice", "each perturbation in one set only", _REMAKE
        )
    for column, allowed in ((SET, SETS), (CATEGORY, CATEGORIES)):
        rows = table if column == SET else table[table[SET] == TEST]
        wrong = rows[~rows[column].isin(allowed)]
        if len(wrong):
            row = wrong.iloc[0]
            raise InputError(
                f"{path}, perturbation {row[PERTURBATION]!r}, column {column}",
                repr(row[column]),
                f"one of {list(allowed)}",
                _REMAKE,
            )
    if CONTROL in set(table[PERTURBATION]):
        raise InputError(path, f"a row for {CONTROL!r}", "perturbations only", _REMAKE)
    for which in (TRAIN, TEST):
        if not (table[SET] == which).any():
            raise InputError(path, f"no perturbation in set {which!r}", "at least one", _REMAKE)


def check_split_covers_cells(split: FoldSplit, obs: pd.DataFrame, cells_path: str | Path) -> None:
    """Raise an InputError if the split and the cells do not hold the same perturbations.

    Labels that the split leaves out, for whatever reason, are named in ``split.json`` and not asked for.
    """
    in_split = set(split.table.index)
    in_cells = set(cell_labels(obs, split.info)) - {CONTROL, *split.info.get(LEFT_OUT, ())}
    for extra, where, other in (
        (in_split - in_cells, split.path, cells_path),
        (in_cells - in_split, cells_path, split.path),
    ):
        if extra:
            raise InputError(
                where,
                f"{len(extra)} perturbations that {other} lacks, e.g. {sorted(extra)[:3]}",
                "the same perturbations in both",
                "rerun the pair stage on these cells",
            )
