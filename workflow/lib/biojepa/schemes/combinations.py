"""Hold out combinations, by the protocols that published comparisons use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from biojepa.contracts import CONTROL
from biojepa.errors import InputError
from biojepa.labels import genes_of, is_combination
from biojepa.schemes.fold import MIN_PERTURBATIONS, HeldOut, require_sets
from biojepa.splits import split_table

# Half of them is trained, the other half is for validation and test.
MIN_COMBINATIONS = 4
# Shares of GEARS' own split: genes, and combinations of these genes, that are trained; then the same of
# what is left, for validation.
GEARS_TEST_SHARE, GEARS_VALIDATION_SHARE = 0.75, 0.9
HALF_OF_DOUBLES, GEARS_SIMULATION = "half_of_doubles", "gears_simulation"


def half_of_doubles(
    labels: Iterable[str],
    fold: int,
    validation_share: float = 0.1,
    seed: int = 0,
    where: str | Path = "the screen",
) -> HeldOut:
    """Train on all singles and half of the combinations; validate and test on the other half.

    The protocol of Ahlmann-Eltze et al. (2025) for screens of doubles. Folds are independent draws and no
    partition: a combination may be tested in several of them, and averages over folds count it once.

    Parameters
    ----------
    labels
        Perturbations; control is ignored.
    fold
        Number of the draw.
    validation_share
        Share of all labels to keep for validation, at most a third of the combinations held out.
    seed, where
        As in :func:`split_genes`.

    Returns
    -------
    The fold.

    Raises
    ------
    InputError
        With fewer than four combinations.
    """
    names, combinations = _combinations(labels, where)
    rng = np.random.default_rng([seed, fold])
    shuffled = [str(name) for name in rng.permutation(combinations)]
    held_out = shuffled[len(shuffled) // 2 :]
    n_validation = min(max(1, round(validation_share * len(names))), max(1, len(held_out) // 3))
    validation, test = set(held_out[:n_validation]), set(held_out[n_validation:])
    training = [name for name in names if name not in held_out]
    return HeldOut(split_table(names, validation, test, training))


def gears_simulation(
    labels: Iterable[str],
    fold: int,
    validation_share: float = 0.1,
    seed: int = 0,
    where: str | Path = "the screen",
) -> HeldOut:
    """Hold out a quarter of the genes, and a quarter of the combinations of the other genes.

    The split called *simulation* by GEARS (Roohani et al. 2024): three quarters of the genes are trained.
    Tested are the singles of the other genes, combinations with one or no trained gene, and a quarter of
    the combinations whose genes are all trained. Validation is split off the rest in the same way, with
    nine tenths in place of three quarters. Folds are independent draws. Categories are those of this
    pipeline: a partner counts as seen when it is trained *as a single*, where GEARS asks whether it is
    among the trained genes.

    Parameters
    ----------
    labels
        Perturbations; control is ignored.
    fold
        Number of the draw.
    validation_share
        Not used: the preset says how much is for validation.
    seed, where
        As in :func:`split_genes`.

    Returns
    -------
    The fold; facts ``held_out_genes`` and ``validation_genes``.

    Raises
    ------
    InputError
        With fewer than four combinations, or when a set would be too small.
    """
    names, _ = _combinations(labels, where)
    rng = np.random.default_rng([seed, fold])
    test, held_out = _gears_draw(names, GEARS_TEST_SHARE, rng)
    rest = [name for name in names if name not in test]
    validation, of_validation = _gears_draw(rest, GEARS_VALIDATION_SHARE, rng)
    training = [name for name in rest if name not in validation]
    require_sets(
        f"{where}, scheme combination, protocol {GEARS_SIMULATION}, fold {fold}",
        len(training),
        len(validation),
        len(test),
        "use pair.combination_protocol half_of_doubles, or the scheme perturbation",
    )
    return HeldOut(
        split_table(names, validation, test, training),
        {"held_out_genes": sorted(held_out), "validation_genes": sorted(of_validation)},
    )


def _gears_draw(names: Sequence[str], share: float, rng: np.random.Generator) -> tuple[set[str], set[str]]:
    """Return the labels that are not trained when ``share`` of the genes is, and the genes that are not."""
    genes = sorted({gene for name in names for gene in genes_of(name)})
    known = {str(gene) for gene in rng.permutation(genes)[: int(share * len(genes))]}
    out = {name for name in names if not known.issuperset(genes_of(name))}
    composed = [name for name in names if name not in out and is_combination(name)]
    kept = int(share * len(composed))
    return out | {str(name) for name in rng.permutation(composed)[kept:]}, set(genes) - known


COMBINATION_PROTOCOLS: dict[str, Callable[..., HeldOut]] = {
    HALF_OF_DOUBLES: half_of_doubles,
    GEARS_SIMULATION: gears_simulation,
}


def _combinations(labels: Iterable[str], where: str | Path) -> tuple[list[str], list[str]]:
    """Return all perturbations and the combinations among them, sorted; refuse too few of these."""
    names = sorted(set(labels) - {CONTROL})
    combinations = [name for name in names if is_combination(name)]
    if len(combinations) < MIN_COMBINATIONS or len(names) < MIN_PERTURBATIONS:
        raise InputError(
            f"{where}, scheme combination",
            f"{len(combinations)} combination(s) among {len(names)} perturbation(s)",
            f"at least {MIN_COMBINATIONS} combinations among {MIN_PERTURBATIONS} perturbations",
            "use the scheme perturbation or gene, which need no combinations; qc.tsv says what was removed",
        )
    return names, combinations
