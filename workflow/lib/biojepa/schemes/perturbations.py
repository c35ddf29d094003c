"""Folds over perturbations, over the genes that they carry, and none at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from biojepa.contracts import CONTROL
from biojepa.errors import InputError
from biojepa.labels import genes_of, is_combination
from biojepa.schemes.fold import MIN_PERTURBATIONS, MIN_TRAINING, HeldOut, draw_validation, require_sets
from biojepa.splits import split_table


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
    singles = [name for name in names if not is_combination(name)]
    combinations = [name for name in names if is_combination(name)]
    # One continued deal over both groups keeps the fold sizes within one of each other.
    dealt = [str(name) for group in (singles, combinations) for name in rng.permutation(group)]
    fold_of = {name: index % n_folds for index, name in enumerate(dealt)}

    tables = []
    for fold in range(n_folds):
        rest = [name for name in dealt if fold_of[name] != fold]
        validation = draw_validation(rest, round(validation_share * len(names)), rng)
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


def split_genes(
    labels: Iterable[str],
    fold: int,
    n_folds: int = 5,
    validation_share: float = 0.1,
    seed: int = 0,
    where: str | Path = "the screen",
) -> HeldOut:
    """Hold out genes: every perturbation that carries a held-out gene is tested.

    Each gene is held out in exactly one of ``n_folds`` folds; a combination whose genes are held out in
    different folds is tested in each of them. Validation is drawn by genes too, so that what selects a
    model is composed of unseen genes as the test is: genes are added at random until they carry about the
    wanted number of perturbations, leaving out a gene that would carry far more. No training perturbation
    carries a gene of a test or validation one's held-out genes.

    Parameters
    ----------
    labels
        Perturbations; control is ignored.
    fold, n_folds
        Which of how many.
    validation_share
        Share of all labels to keep for validation, about; at least one gene.
    seed
        Of the deal; validation follows from it and the fold.
    where
        What to name in a message.

    Returns
    -------
    The fold; facts ``held_out_genes`` and ``validation_genes``.

    Raises
    ------
    InputError
        When there are too few genes or perturbations, with their numbers.
    """
    names = sorted(set(labels) - {CONTROL})
    genes = sorted({gene for name in names for gene in genes_of(name)})
    if len(names) < MIN_PERTURBATIONS or len(genes) < n_folds:
        raise InputError(
            f"{where}, scheme gene",
            f"{len(genes)} perturbed gene(s) in {len(names)} perturbation(s)",
            f"at least {n_folds} genes, one for each fold, in {MIN_PERTURBATIONS} perturbations",
            "lower preprocess.min_cells_per_perturbation or pair.n_folds; qc.tsv says what was removed",
        )
    rng = np.random.default_rng(seed)
    alone = [gene for gene in genes if gene in names]
    others = [gene for gene in genes if gene not in names]
    # One continued deal over both groups, so that every fold tests genes that are perturbed alone.
    dealt = [str(gene) for group in (alone, others) for gene in rng.permutation(group)]
    held_out = {gene for place, gene in enumerate(dealt) if place % n_folds == fold}
    test = {name for name in names if held_out.intersection(genes_of(name))}
    rest = [name for name in names if name not in test]
    order = np.random.default_rng([seed, fold]).permutation(
        sorted({gene for name in rest for gene in genes_of(name)})
    )
    chosen = _validation_genes(rest, [str(gene) for gene in order], round(validation_share * len(names)))
    validation = {name for name in rest if chosen.intersection(genes_of(name))}
    require_sets(
        f"{where}, scheme gene, fold {fold}",
        len(rest) - len(validation),
        len(validation),
        len(test),
        "lower preprocess.min_cells_per_perturbation, or raise pair.n_folds so that a fold holds out less",
    )
    training = [name for name in rest if name not in validation]
    return HeldOut(
        split_table(names, validation, test, training),
        {"held_out_genes": sorted(held_out), "validation_genes": sorted(chosen)},
    )


def _validation_genes(rest: Sequence[str], order: Sequence[str], wanted: int) -> set[str]:
    """Choose genes in ``order`` until at least ``wanted`` and at most twice as many labels carry one."""
    carriers = {gene: {name for name in rest if gene in genes_of(name)} for gene in order}
    wanted = max(1, wanted)
    chosen, covered = set[str](), set[str]()
    for gene in order:
        if len(covered) >= wanted:
            break
        more = covered | carriers[gene]
        if len(more) <= min(2 * wanted, len(rest) - MIN_TRAINING):
            chosen, covered = chosen | {gene}, more
    if not chosen and order:
        chosen = {min(order, key=lambda gene: len(carriers[gene]))}
    return chosen
