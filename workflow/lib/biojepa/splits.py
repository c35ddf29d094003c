"""Write down once what a fold holds out, and check it ever after.

The unit is the perturbation. ``split.tsv`` is the only truth on what is held out; ``split.json``
beside it carries its SHA-256, which every later stage checks before it trusts the table. How it is
chosen: :mod:`biojepa.schemes`.
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
    CONTEXT,
    CONTEXT_COLUMN,
    CONTROL,
    OTHER_CONTEXT,
    PERTURBATION,
    SET,
    SPLIT_COLUMNS,
    TEST,
    TRAIN,
    VAL,
)
from biojepa.errors import InputError, StoppedRun
from biojepa.files import read_tsv, sha256_of, write_json, write_tsv
from biojepa.labels import genes_of, in_context, is_combination, perturbation_of


class LeakageError(StoppedRun):
    """A held-out perturbation was found where only training perturbations may be."""


@dataclass(frozen=True)
class SeenGenes:
    """What training perturbs.

    Attributes
    ----------
    singles
        Genes that are perturbed on their own.
    counts
        Gene to the training perturbations that carry it.
    perturbations
        All of them.
    """

    singles: frozenset[str]
    counts: Mapping[str, int]
    perturbations: frozenset[str] = frozenset()

    @classmethod
    def of(cls, training: Iterable[str]) -> SeenGenes:
        """Collect the genes of training perturbations."""
        names = frozenset(training)
        counts = Counter(gene for name in names for gene in genes_of(name))
        return cls(frozenset(name for name in names if not is_combination(name)), counts, names)

    def categorize(self, label: str) -> tuple[str, int]:
        """Say what training knows of a label's genes.

        Returns
        -------
        category
            ``other_context`` when the label names a context and training holds the same perturbation in
            another; ``combo_seen2`` when every partner is trained as a single, ``combo_seen1`` when some are,
            ``combo_seen0`` when none is; ``single_in_combo`` when the gene occurs in a trained
            combination, ``single`` when training never perturbed it.
        n_genes_seen
            Genes of the label that occur in any training perturbation.
        """
        genes = genes_of(label)
        n_seen = sum(gene in self.counts for gene in genes)
        if label != perturbation_of(label) and perturbation_of(label) in self.perturbations:
            return OTHER_CONTEXT, n_seen
        if len(genes) == 1:
            return ("single_in_combo" if n_seen else "single"), n_seen
        n_singles = sum(gene in self.singles for gene in genes)
        if n_singles == len(genes):
            return "combo_seen2", n_seen
        return ("combo_seen1" if n_singles else "combo_seen0"), n_seen


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


def read_facts(path: str | Path) -> dict[str, Any]:
    """Read ``split.json`` beside a ``split.tsv``: what defines the fold."""
    return json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))


def cell_contexts(obs: pd.DataFrame, facts: Mapping[str, Any]) -> np.ndarray | None:
    """Return the context of each cell, (cells,) text; None for a fold that holds out no context.

    Parameters
    ----------
    obs
        Of ``cells.h5ad``.
    facts
        Of ``split.json``.
    """
    if CONTEXT not in facts:
        return None
    return obs[facts[CONTEXT_COLUMN]].astype(str).to_numpy()


def cell_labels(obs: pd.DataFrame, facts: Mapping[str, Any]) -> np.ndarray:
    """Return the perturbation of each cell as ``split.tsv`` of a fold spells it, (cells,) text.

    Perturbed cells of a held-out context carry it in their label, ``A+B @ K562``, so that they are other
    perturbations than those of the same genes elsewhere. Control stays control in every context.
    """
    label = obs[PERTURBATION].astype(str).to_numpy()
    context = cell_contexts(obs, facts)
    if context is None:
        return label
    held_out = (context == facts[CONTEXT]) & (label != CONTROL)
    placed = {name: in_context(name, facts[CONTEXT]) for name in set(label[held_out])}
    return np.array(
        [placed[name] if out else name for name, out in zip(label, held_out, strict=True)], dtype=object
    )


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
