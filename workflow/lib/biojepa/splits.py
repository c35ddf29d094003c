"""Decide which perturbations are held out, write it down once, and check it ever after.

The unit is the perturbation. ``split.tsv`` is the only truth on what is held out; ``split.json``
beside it carries its SHA-256, which every later stage checks before it trusts the table.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biojepa.contracts import (
    CATEGORY,
    CONTROL,
    GENE_SEPARATOR,
    PERTURBATION,
    SET,
    SPLIT_COLUMNS,
    TEST,
    TRAIN,
    VAL,
)
from biojepa.errors import InputError, StoppedRun
from biojepa.files import read_tsv, sha256_of, write_json, write_tsv
from biojepa.labels import genes_of

MIN_PERTURBATIONS = 6


class LeakageError(StoppedRun):
    """A held-out perturbation was found where only training perturbations may be."""


@dataclass(frozen=True)
class SeenGenes:
    """Genes that training perturbs.

    Attributes
    ----------
    singles
        Genes that are perturbed on their own.
    counts
        Gene to the training perturbations that carry it.
    """

    singles: frozenset[str]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, training: Iterable[str]) -> SeenGenes:
        """Collect the genes of training perturbations."""
        names = set(training)
        counts = Counter(gene for name in names for gene in genes_of(name))
        return cls(frozenset(name for name in names if GENE_SEPARATOR not in name), counts)

    def categorize(self, label: str) -> tuple[str, int]:
        """Say what training knows of a label's genes.

        Returns
        -------
        category
            ``combo_seen2`` when every partner is trained as a single, ``combo_seen1`` when some are,
            ``combo_seen0`` when none is; ``single_in_combo`` when the gene occurs in a trained
            combination, ``single`` when training never perturbed it.
        n_genes_seen
            Genes of the label that occur in any training perturbation.
        """
        genes = genes_of(label)
        n_seen = sum(gene in self.counts for gene in genes)
        if len(genes) == 1:
            return ("single_in_combo" if n_seen else "single"), n_seen
        n_singles = sum(gene in self.singles for gene in genes)
        if n_singles == len(genes):
            return "combo_seen2", n_seen
        return ("combo_seen1" if n_singles else "combo_seen0"), n_seen


def split_perturbations(
    labels: Iterable[str], n_folds: int = 5, validation_share: float = 0.1, seed: int = 0
) -> list[pd.DataFrame]:
    """Deal the perturbations into folds so that each is tested exactly once.

    Singles and combinations are dealt separately, so that every fold tests both. Validation
    perturbations are drawn from what a fold does not test, likewise from both.

    Parameters
    ----------
    labels
        Perturbations; control is ignored.
    n_folds
        Folds; each tests about ``1 / n_folds`` of the labels.
    validation_share
        Share of all labels that a fold keeps for selection and early stopping, at least one.
    seed
        Of the shuffle.

    Returns
    -------
    One table per fold with the columns of ``contracts.SPLIT_COLUMNS``, sorted by label.

    Raises
    ------
    ValueError
        With fewer than six perturbations, or fewer than two folds, or more folds than labels.
    """
    names = sorted(set(labels) - {CONTROL})
    if len(names) < MIN_PERTURBATIONS:
        raise ValueError(
            f"{len(names)} perturbations cannot be split into training, validation and test; "
            f"at least {MIN_PERTURBATIONS} are needed"
        )
    if not 2 <= n_folds <= len(names):
        raise ValueError(f"n_folds is {n_folds}; expected 2 to {len(names)}, the number of perturbations")
    rng = np.random.default_rng(seed)
    singles = [name for name in names if GENE_SEPARATOR not in name]
    combinations = [name for name in names if GENE_SEPARATOR in name]
    # One continued deal over both groups keeps the fold sizes within one of each other.
    dealt = [str(name) for group in (singles, combinations) for name in rng.permutation(group)]
    fold_of = {name: index % n_folds for index, name in enumerate(dealt)}

    tables = []
    for fold in range(n_folds):
        rest = [name for name in dealt if fold_of[name] != fold]
        n_validation = min(max(1, round(validation_share * len(names))), len(rest) - 2)
        rest_singles = rng.permutation([name for name in rest if GENE_SEPARATOR not in name])
        rest_combinations = rng.permutation([name for name in rest if GENE_SEPARATOR in name])
        n_combinations = round(n_validation * len(rest_combinations) / len(rest))
        validation = set(rest_combinations[:n_combinations]) | set(
            rest_singles[: n_validation - n_combinations]
        )
        training = [name for name in rest if name not in validation]
        tables.append(split_table(names, validation, {n for n in names if fold_of[n] == fold}, training))
    return tables


def no_split(labels: Iterable[str]) -> pd.DataFrame:
    """Give every perturbation to training, for a model that is applied to perturbations outside the screen.

    Nothing can be evaluated on such a split: what to expect of the model is what its like reached on
    the held-out perturbations of another scheme.

    Parameters
    ----------
    labels
        Perturbations; control is ignored.

    Returns
    -------
    One table with the columns of ``contracts.SPLIT_COLUMNS``, sorted by label.

    Raises
    ------
    ValueError
        Without any perturbation.
    """
    names = sorted(set(labels) - {CONTROL})
    if not names:
        raise ValueError("no perturbation to train on; at least one is needed")
    return split_table(names, (), (), names)


def split_table(
    names: Sequence[str], validation: Collection[str], test: Collection[str], training: Collection[str]
) -> pd.DataFrame:
    """Lay out one fold as a table; ``category`` is empty for training perturbations."""
    seen, trained = SeenGenes.of(training), set(training)
    rows = []
    for name in names:
        group = TEST if name in test else VAL if name in validation else TRAIN
        category, n_seen = seen.categorize(name)
        if name in trained:  # what the other training perturbations know of it
            n_seen = sum(seen.counts[gene] > 1 for gene in genes_of(name))
        rows.append((name, group, "" if group == TRAIN else category, n_seen))
    return pd.DataFrame(rows, columns=list(SPLIT_COLUMNS))


def write_split(table: pd.DataFrame, path: str | Path, **facts: Any) -> None:
    """Write ``split.tsv`` and, beside it, ``split.json`` with the facts and the SHA-256 of the table."""
    path = Path(path)
    write_tsv(table, path)
    counts = {f"n_{name}": int((table[SET] == name).sum()) for name in (TRAIN, VAL, TEST)}
    write_json({**facts, **counts, "sha256": sha256_of(path)}, path.with_suffix(".json"))


def read_split(path: str | Path, info: str | Path | None = None) -> pd.DataFrame:
    """Read ``split.tsv`` after checking it against the SHA-256 in ``split.json``.

    Raises
    ------
    InputError
        When the table was changed after it was frozen, or is not a split table.
    """
    path = Path(path)
    info = Path(info) if info is not None else path.with_suffix(".json")
    frozen = json.loads(info.read_text(encoding="utf-8"))["sha256"]
    seen = sha256_of(path)
    if seen != frozen:
        raise InputError(
            path,
            f"SHA-256 {seen}",
            f"{frozen}, as frozen in {info.name}",
            "a split must not be edited; delete both files and rerun the pair stage",
        )
    table = read_tsv(path, dtype={PERTURBATION: str, SET: str, CATEGORY: str})
    if list(table.columns) != list(SPLIT_COLUMNS):
        raise InputError(
            path, f"columns {list(table.columns)}", f"{list(SPLIT_COLUMNS)}", "rerun the pair stage"
        )
    return table.fillna({CATEGORY: ""})


def require_same_split(facts: Mapping[str, Any], path: str | Path, what: str | Path) -> None:
    """Leakage sentinel: stop when something was made with another split than the one at ``path``.

    A model of another fold was trained on perturbations that this fold tests.

    Parameters
    ----------
    facts
        Of ``pairs.h5`` or of a model; holds ``split_sha256``.
    path
        The ``split.tsv`` in use.
    what
        The file that the facts came from, for the message.

    Raises
    ------
    LeakageError
        Naming both files.
    """
    made_with, here = facts.get("split_sha256"), sha256_of(path)
    if made_with != here:
        raise LeakageError(
            f"{what} was made with a split of SHA-256 {made_with}, but {path} has {here}, so that it may "
            "have seen what this split holds out. Fix: use the files of one fold together, or rerun from "
            "the pair stage"
        )


def labels_in(table: pd.DataFrame, *sets: str) -> list[str]:
    """Return the perturbations of the given sets, in the table's order."""
    return table.loc[table[SET].isin(sets), PERTURBATION].tolist()


def refuse_held_out(labels: Iterable[str], table: pd.DataFrame, allowed: Collection[str], what: str) -> None:
    """Leakage sentinel: stop when ``labels`` hold a perturbation outside the ``allowed`` sets.

    Parameters
    ----------
    labels
        Labels that are about to be used; control is always allowed.
    table
        The fold's split table.
    allowed
        Sets that may be used here, such as ``("train",)``.
    what
        What uses them, for the message.

    Raises
    ------
    LeakageError
        Naming the perturbations.
    """
    permitted = set(labels_in(table, *allowed)) | {CONTROL}
    leaked = sorted(set(labels) - permitted)
    if leaked:
        raise LeakageError(
            f"{what} would use {len(leaked)} perturbation(s) outside {'/'.join(allowed)}: "
            f"{', '.join(leaked[:10])}"
        )
