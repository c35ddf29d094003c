"""Whether the guides of a perturbation do the same to their cells.

A guide is compared with its siblings, the other guides of its perturbation, by the energy distance of
:mod:`biojepa.preprocess.effects`, which is twice the squared distance between mean responses without its
expectation under noise. Three such distances say how much two responses have in common:

    agreement = 1 − E(guide, siblings) / (E(guide, control) + E(siblings, control))

This is the concordance of the two mean responses, 2 a·b / (a² + b²), without noise in any of the terms: 1
where they are the same, 0 where one of them is no response at all or they have nothing in common, and below 0
where they point apart. Whether guides differ at all is tested by permuting cells among the guides.

Guides are rarely spread evenly over batches, and what batches do must not pass for what guides do. So cells
are compared after the mean of their batch is taken off, and permuted within batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from biojepa.contracts import CONTROL, DISCORDANT, GUIDE_ID, GUIDE_TABLE_COLUMNS, PERTURBATION
from biojepa.guides import GUIDE_JOIN
from biojepa.labels import genes_of
from biojepa.preprocess.batch_effects import BatchCentred, permute_within
from biojepa.preprocess.effects import (
    JOIN,
    SIGNIFICANT,
    TargetExpression,
    energy_of_splits,
    sample_rows,
)
from biojepa.preprocess.settings import PreprocessSettings

# Below it, what the responses do not share is as large as what they do.
MIN_AGREEMENT = 0.5
# Permutations after which a guide that clearly agrees is left.
FIRST = 100
# Cosine from which two responses go the same way.
SAME_WAY = 0.5
# Cells of a guide at most: enough to see half of a clear effect go missing, which is what the flag asks for.
GUIDE_CELLS = 75
WEAK_GUIDE = "weak"

Guides = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Moments:
    """Mean ``(d,)`` of some cells in principal components, their summed variances, and their number."""

    mean: np.ndarray
    variance: float
    n: int

    @classmethod
    def of(cls, points: np.ndarray) -> Moments:
        """Return the moments of cells ``(n, d)``, two or more."""
        return cls(points.mean(axis=0), float(points.var(axis=0, ddof=1).sum()), len(points))

    def energy(self, other: Moments) -> float:
        """Return the unbiased squared-Euclidean energy distance, which needs no more than moments."""
        between = float(((self.mean - other.mean) ** 2).sum())
        return 2 * (between - self.variance / self.n - other.variance / other.n)


def guides_of(obs: pd.DataFrame) -> Guides:
    """Return for each perturbation its guides and their cells; cells with one guide, controls left out.

    Parameters
    ----------
    obs
        Of all cells: ``perturbation`` and ``guide_id``.
    """
    names = pd.DataFrame({name: obs[name].astype(str).to_numpy() for name in (PERTURBATION, GUIDE_ID)})
    one = (names[GUIDE_ID] != "") & ~names[GUIDE_ID].str.contains(GUIDE_JOIN, regex=False)
    rows = np.flatnonzero(one & (names[PERTURBATION] != CONTROL))
    found: Guides = {}
    for key, places in names.iloc[rows].groupby([PERTURBATION, GUIDE_ID]).indices.items():
        label, guide = map(str, tuple(key))  # type: ignore[arg-type]
        found.setdefault(label, {})[guide] = rows[places]
    return found


def sampled_guides(guides: Guides, sample: Mapping[str, np.ndarray], settings: PreprocessSettings) -> Guides:
    """Return the cells in which guides are compared: of perturbations with two guides or more to compare.

    A guide is compared where it has ``min_cells_per_guide`` cells, in at most ``GUIDE_CELLS`` of them. Those
    of which scores are needed anyway come first; which these are has nothing to do with the guide.

    Parameters
    ----------
    guides
        From :func:`guides_of`.
    sample
        Perturbation to its cells in which effects are measured.
    settings
        Sizes and seed.
    """
    found: Guides = {}
    most = min(GUIDE_CELLS, settings.effect_cells)
    for label, rows_of in guides.items():
        enough = {g: rows for g, rows in rows_of.items() if len(rows) >= settings.min_cells_per_guide}
        for guide, rows in enough.items() if len(enough) > 1 else ():
            name = f"{label}, guide {guide}"
            known = sample_rows(np.intersect1d(rows, sample[label]), most, settings.seed, name)
            others = np.setdiff1d(rows, known)
            more = sample_rows(others, most - len(known), settings.seed, name)
            found.setdefault(label, {})[guide] = np.union1d(known, more)
    return found


def compare_siblings(
    points: Mapping[str, np.ndarray],
    control: Moments,
    permutations: int,
    rng: np.random.Generator,
    strata: np.ndarray | None = None,
) -> dict[str, dict[str, float]]:
    """Compare each guide of a perturbation with its siblings.

    Most guides agree, and few permutations show it. So ``FIRST`` of them are made, and the others only where
    no more than a fifth of the first are as large as what was observed. A p-value below 0.2 can only come of
    all permutations, so that those are as valid as if all had been made for every guide.

    Parameters
    ----------
    points
        Guide to its cells in principal components ``(cells, d)``; two guides or more.
    control
        Moments of control cells in the same components.
    permutations
        Of cells among the guides, at most.
    rng
        Draws them.
    strata
        ``(all cells,)`` of the guides one after the other: within what cells are permuted. None: all alike.

    Returns
    -------
    For each guide ``effect_size``, ``agreement`` (within −1 and 1; missing where both effects together are 0
    or less), ``same_way`` (see :func:`is_more_of`) and ``p``.
    """
    pooled = np.concatenate(list(points.values()))
    code = np.repeat(np.arange(len(points)), [len(cells) for cells in points.values()])
    first = min(FIRST, permutations)
    observed, as_large, made = np.zeros((3, len(points)))
    for n in (first, permutations - first):
        asked = np.flatnonzero(5 * as_large <= made)  # all of them at first
        if n and len(asked):
            splits = np.vstack([code, permute_within(code, strata, n, rng)])
            for place in asked:
                distance = energy_of_splits(pooled, (splits == place).astype(np.float64))
                observed[place] = distance[0]
                as_large[place] += np.sum(distance[1:] >= distance[0])
                made[place] += n
    table = {}
    for number, (guide, cells) in enumerate(points.items()):
        own, others = (Moments.of(part).energy(control) for part in (cells, pooled[code != number]))
        both = own + others
        table[guide] = {
            "effect_size": own,
            "agreement": float(np.clip(1 - observed[number] / both, -1, 1)) if both > 0 else np.nan,
            "same_way": is_more_of(own, others, observed[number]),
            "p": (1 + as_large[number]) / (1 + made[number]),
        }
    return table


def is_more_of(own: float, others: float, between: float) -> bool:
    """Tell whether a response is stronger than another and, by a cosine of 0.5 or more, of the same kind.

    Parameters
    ----------
    own, others
        Energy distances of the two to the control.
    between
        Energy distance of the two.
    """
    return own > others > 0 and (own + others - between) / (2 * np.sqrt(own * others)) >= SAME_WAY


def guide_table(
    guides: Guides,
    sampled: Guides,
    scores: BatchCentred,
    control: np.ndarray,
    target: TargetExpression,
    weak: set[str],
    perturbations: pd.DataFrame,
    settings: PreprocessSettings,
) -> pd.DataFrame:
    """Return the rows of guides.tsv, sorted by perturbation and guide.

    Parameters
    ----------
    guides, sampled
        From :func:`guides_of` and :func:`sampled_guides`.
    scores
        Of the sampled cells and of the controls.
    control
        Control cells to compare with.
    target
        Expression of the targets.
    weak
        Guides that hardly change their target.
    perturbations
        Rows of perturbations.tsv.
    settings
        Permutations and seed.
    """
    reference = Moments.of(scores.of(control))
    clear = set(perturbations.loc[perturbations["effect_q"] < SIGNIFICANT, PERTURBATION])
    found = {}
    for label, rows_of in sampled.items():
        rng = np.random.default_rng([settings.seed, zlib.crc32(label.encode()), 2])
        points = {guide: scores.of(rows) for guide, rows in rows_of.items()}
        strata = scores.strata(np.concatenate(list(rows_of.values())))
        compared = compare_siblings(points, reference, settings.permutations, rng, strata)
        found.update({(label, guide): row for guide, row in compared.items()})
    table = []
    for label, rows_of in guides.items():
        for guide, rows in rows_of.items():
            changes = [target.log2fc(gene, rows) if gene in target else None for gene in genes_of(label)]
            row = {
                PERTURBATION: label,
                GUIDE_ID: guide,
                "n_cells": len(rows),
                "on_target_log2fc": JOIN.join("" if c is None else f"{c:.6g}" for c in changes),
                "flag": WEAK_GUIDE if guide in weak else "",
            }
            table.append({**row, **found.get((label, guide), {})})
    columns = [*(name for name in GUIDE_TABLE_COLUMNS if name != "q"), "same_way"]
    result = pd.DataFrame(table, columns=columns)
    p = result["p"].to_numpy(dtype=np.float64)
    result["q"] = np.nan
    if np.isfinite(p).any():
        result.loc[np.isfinite(p), "q"] = false_discovery_control(p[np.isfinite(p)])
    # The ratio of two effects that are none is noise.
    result.loc[~result[PERTURBATION].isin(clear), "agreement"] = np.nan
    for place in _discordant(result, result["same_way"]):
        result.loc[place, "flag"] = JOIN.join(filter(None, [DISCORDANT, str(result.loc[place, "flag"])]))
    return result[list(GUIDE_TABLE_COLUMNS)]


def differing(table: pd.DataFrame) -> pd.Series:
    """Tell of which rows of guides.tsv the guide differs from its siblings and shares less than half."""
    return (table["q"] < SIGNIFICANT) & (table["agreement"] < MIN_AGREEMENT)


def _discordant(table: pd.DataFrame, same_way: pd.Series) -> list[int]:
    """Return the rows of guides that are not to be trusted, of those that differ from their siblings.

    A guide that does the same as its siblings, only more of it, is one that works among guides that do not.
    Where all guides of a perturbation are left, as of two, which of them is right cannot be seen. The
    strongest is kept then: guides that do nothing are more frequent than guides that do something else.
    """
    suspected = table[differing(table) & ~same_way.eq(True)]
    n_compared = table["p"].notna().groupby(table[PERTURBATION]).sum()
    rows: list[int] = []
    for label, group in suspected.groupby(PERTURBATION):
        kept = group["effect_size"].idxmax() if len(group) == n_compared[label] else None
        rows.extend(row for row in group.index if row != kept)
    return rows


def discordant_guides(table: pd.DataFrame) -> dict[str, set[str]]:
    """Return for each perturbation with such guides those that guides.tsv flags as discordant."""
    flagged = table[table["flag"].str.split(JOIN).map(lambda flags: DISCORDANT in flags).astype(bool)]
    return {str(label): set(group[GUIDE_ID]) for label, group in flagged.groupby(PERTURBATION)}
