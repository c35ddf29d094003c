"""Match the rows and columns of predictions made elsewhere with those of a fold, and note what is off."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from biojepa.contracts import ALL_CONTEXTS, CONTEXT, CONTROL, PERTURBATION, SET, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.labels import context_of, in_context, spell_label

LOGGER = logging.getLogger(__name__)
SHOWN = 5
_ENSEMBL = re.compile(r"ENS[A-Z]*[GT]\d{6,}")


@dataclass
class Problems:
    """What is wrong with a file, collected so that one message names all of it."""

    path: Path
    found: list[InputError] = field(default_factory=list)

    def add(self, where: str, found: str, expected: str, fix: str) -> None:
        """Keep one problem of a part of the file."""
        self.found.append(InputError(where, found, expected, fix))

    def raise_if_any(self) -> None:
        """Raise all of them as one InputError."""
        if len(self.found) == 1:
            only = self.found[0]
            raise InputError(f"{self.path}, {only.where}", only.found, only.expected, only.fix)
        if self.found:
            listed = "".join(f"\n- {problem}" for problem in self.found)
            raise InputError(
                self.path,
                f"{len(self.found)} problems",
                "predictions as config/README.md describes them, section Evaluate predictions made elsewhere",
                f"mend each of these{listed}",
            )


def match_genes(obs: pd.DataFrame, var: pd.DataFrame, genes: Sequence[str], problems: Problems) -> np.ndarray:
    """Return the column of each gene, (genes,), -1 where there is none."""
    names = pd.Index(var.index.astype(str))
    asked = pd.Index(genes)
    twice = names[names.duplicated() & names.isin(asked)].unique()
    if len(twice):
        found = f"{len(twice)} genes twice, {some(twice)}"
        problems.add("var", found, "unique genes", "name each gene once")
    first = {name: len(names) - 1 - back for back, name in enumerate(reversed(names))}
    columns = np.array([first.get(gene, -1) for gene in asked])
    missing = asked[columns < 0]
    if len(missing):
        problems.add(
            "var",
            f"{len(missing)} of the {len(asked)} genes of this fold missing, {some(missing)}",
            "every gene of names/genes in pairs.h5, by symbol",
            _gene_fix(obs, var, asked, missing),
        )
    extra = len(names.difference(asked))
    if extra:
        LOGGER.info("%s: %d genes that this fold does not use are left out", problems.path, extra)
    return columns


def _gene_fix(obs: pd.DataFrame, var: pd.DataFrame, genes: pd.Index, missing: pd.Index) -> str:
    """Say what to change, by the most likely mistake."""
    half = len(missing) / 2
    names = var.index.astype(str)
    for column in var:
        if missing.isin(var[column].astype(str)).sum() > half:
            return f"the column {column!r} of var holds the symbols: make it the index"
    if genes.isin(obs.index.astype(str)).sum() > len(genes) / 2:
        return "the matrix is transposed: perturbations or cells are rows, genes are columns"
    if sum(bool(_ENSEMBL.match(name)) for name in names[:200]) > min(len(names), 200) / 2:
        return "translate the Ensembl identifiers to symbols; var['gene_id'] of cells.h5ad holds both"
    if missing.str.upper().isin(names.str.upper()).sum() > half:
        return f"the names differ in upper and lower case only, such as {missing[0]!r}: write them alike"
    return "predict these genes too, control expression where the model does not know them"


def match_labels(obs: pd.DataFrame, split: pd.DataFrame, problems: Problems) -> np.ndarray:
    """Return the position in the split of each line of the file, -1 where it is not to be read."""
    has_column = PERTURBATION in obs
    raw = obs[PERTURBATION] if has_column else obs.index.to_series()
    sets = split.set_index(PERTURBATION)[SET]
    contexts = obs[CONTEXT].astype(str).to_numpy() if CONTEXT in obs else None
    codes, distinct = pd.factorize(raw.astype(str).to_numpy())
    by_label = np.array([spell_label(label, sets.index) for label in distinct] + [None], dtype=object)
    labels = by_label[codes]
    if contexts is not None:
        placed = [
            in_context(label, context) if label else label
            for label, context in zip(labels, contexts, strict=True)
        ]
        inside = pd.Index(placed).isin(sets.index)
        labels = np.where(inside, np.array(placed, dtype=object), labels)
        if any(context_of(label) != ALL_CONTEXTS for label in sets.index):
            # Of the other contexts, and of what the split leaves out of this one, nothing is tested.
            written_out = np.array([bool(label) and context_of(label) != ALL_CONTEXTS for label in labels])
            labels = np.where(inside | written_out | (contexts == ALL_CONTEXTS), labels, "")
    position = sets.index.get_indexer(pd.Index(labels))
    _check_sets(obs, labels, position, sets, problems)
    _check_complete(labels, position, sets, has_column, problems)
    known = sets.to_numpy()
    training = (position >= 0) & (known[position] == TRAIN)
    position = np.where(training, -1, position)
    if contexts is not None:
        _check_contexts(contexts, labels, position, problems)
    if training.any():
        LOGGER.info("%s: %d rows of training perturbations are left out", problems.path, training.sum())
    unknown = (position < 0) & ~training
    if unknown.any():
        LOGGER.info(
            "%s: %d rows of control or of perturbations outside the split are left out",
            problems.path,
            unknown.sum(),
        )
    return position


def _check_sets(
    obs: pd.DataFrame, labels: np.ndarray, position: np.ndarray, sets: pd.Series, problems: Problems
) -> None:
    """Refuse a file whose column ``set`` says otherwise than the split."""
    if SET not in obs:
        return
    declared = obs[SET].astype(str).to_numpy()
    said = (position >= 0) & ~np.isin(declared, ("", "nan", "None"))
    wrong = np.flatnonzero(said & (sets.to_numpy()[position] != declared))
    if len(wrong):
        n = len(set(labels[wrong]))
        label, line = labels[wrong[0]], wrong[0]
        problems.add(
            f"obs, column {SET}",
            f"{n} perturbations in another set than in this split, such as {label!r} as {declared[line]!r}",
            f"{sets[label]!r} for {label!r}, as in split.tsv of this fold",
            "a leak: the predictions were made for another split or fold; fit the model on this one's "
            "training set, or correct the path",
        )


def _check_complete(
    labels: np.ndarray, position: np.ndarray, sets: pd.Series, has_column: bool, problems: Problems
) -> None:
    """Refuse a file without a row for every test perturbation, and name what they may be called there."""
    present = set(position[position >= 0])
    absent = [label for row, label in enumerate(sets.index) if row not in present]
    missing = [label for label in absent if sets[label] == TEST]
    unused = [label for label in absent if sets[label] == VAL]
    if unused:
        LOGGER.info(
            "%s: %d validation perturbations are not predicted; none is scored", problems.path, len(unused)
        )
    if not missing:
        return
    unknown = sorted({str(label) for label in labels[position < 0]} - {CONTROL})
    near = {label: difflib.get_close_matches(label, unknown, n=1, cutoff=0.7) for label in missing[:200]}
    pairs = [f"{label!r} is {match[0]!r} there?" for label, match in near.items() if match]
    hint = f" ({' '.join(pairs[:SHOWN])})" if pairs else ""
    where = "obs, column perturbation" if has_column else "obs, row names (there is no column perturbation)"
    problems.add(
        where,
        f"no row for {len(missing)} test perturbations, {some(missing)}{hint}; "
        f"{len(unknown)} names that this split does not have, {some(unknown)}",
        "every test perturbation of split.tsv, genes joined by +",
        "predict all of them, under these names",
    )


def _check_contexts(
    contexts: np.ndarray, labels: np.ndarray, position: np.ndarray, problems: Problems
) -> None:
    """Refuse rows of one perturbation in several contexts where the split tells none apart."""
    used = position >= 0
    counts = pd.Series(contexts[used]).groupby(labels[used]).nunique()
    several = counts.index[counts > 1]
    if len(several):
        named = sorted(set(contexts[used & (labels == several[0])]))
        problems.add(
            f"obs, column {CONTEXT}",
            f"{len(several)} perturbations in several contexts, such as {several[0]!r} in {named[:SHOWN]}",
            f"one context for each, since this split does not tell contexts apart, called {ALL_CONTEXTS}",
            "predict the contexts together, as their cells occur in the screen, and leave the column out",
        )


def has_cells(
    obs: pd.DataFrame, lines: np.ndarray, owner: np.ndarray, labels: np.ndarray, problems: Problems
) -> bool:
    """Whether the rows are single cells: several for every perturbation. Refuse a mixture."""
    n = np.bincount(owner, minlength=len(labels))
    if not len(n) or n.max() == 1:
        return False
    alone = labels[n == 1]
    if len(alone):
        repeated = labels[n > 1]
        problems.add(
            "obs",
            f"{len(repeated)} perturbations with several rows, {some(repeated)}, "
            f"and {len(alone)} with one, {some(alone)}",
            "one row for each perturbation (means), or several for each (single cells)",
            "remove the repeated rows, or write the cells of all perturbations",
        )
    return True


def some(names: Sequence[str] | pd.Index | np.ndarray) -> str:
    """List the first few names."""
    shown = [str(name) for name in list(names)[:SHOWN]]
    return f"e.g. {shown}" if shown else "none"
