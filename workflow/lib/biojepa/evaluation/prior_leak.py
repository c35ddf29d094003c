"""Look for a sign that prior codes were made from the responses that are to be predicted.

Prior knowledge is a file, and no file says what it was made from. A table of gene features that somebody
computed from this very screen gives away the answer of every held-out perturbation, and nothing but its
likeness to the answer betrays it.

The likeness is compared with what it could be. For pairs of perturbations, at least one of them tested
and without a common gene, let s be the cosine of their codes, and a and b the cosines of their changes in
half A and in half B of the cells. Half B alone is noisy: even the true responses correlate with b only as
ρ(a, b)^½, their reliability. So

    likeness = ρ(s, b) / √ρ(a, b)

is an estimate of how well the codes agree with the noise-free responses. Knowledge that was gained elsewhere
agrees in part: two genes of a complex respond alike, but by how much, and which others do, is not in it.
A copy of the responses has a likeness of about 1, also when it holds noise of these cells. The
coordinates of a copy may be scaled in several ways, so the changes are compared in several forms: as they
are, standardized for each gene, and as scores of their leading components. Where the halves disagree, a
form tells nothing and is left out.

Few perturbations tell little, so what counts is the lower end of an interval: likeness − 1.64 times its
standard error, from a jackknife over perturbations. The bound and what it finds and misses are in
``docs/decisions.md``; ``benchmarks/prior_leaks.py`` measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from biojepa.contracts import CONTEXT, GENE_SEPARATOR, SOURCES, STATISTICAL, TEST
from biojepa.evaluation.scoring import sentinel
from biojepa.evaluation.splits import FoldSplit
from biojepa.evaluation.truth import Moments
from biojepa.labels import genes_of
from biojepa.pairs import multi_hot
from biojepa.prior_names import OTHER_SCREEN_RESPONSES

# Lower end of the likeness from which codes are suspected; what is known from elsewhere stays below.
SUSPICIOUS = 0.6
# One-sided 95 %.
STANDARD_ERRORS = 1.645
# Correlation of the halves below which a form of the changes tells nothing.
MIN_RELIABILITY = 0.2
# Pairs of perturbations in all folds together below which nothing is said.
MIN_PAIRS = 100
MAX_TESTED = MAX_OTHERS = 80
COMPONENTS = (3, 10)


@dataclass(frozen=True)
class FoldEvidence:
    """What one fold says of its prior sources.

    Attributes
    ----------
    labels
        The compared perturbations.
    codes
        Source to (labels, labels) cosines of the codes.
    covered
        Source to (labels,) bool, whether it says anything of the label.
    changes
        Form to (2, labels, labels) cosines of the changes in half A and half B.
    counted
        (labels, labels) bool, pairs that count, each once.
    kinds
        Source to what it was made from, empty where that is not recorded.
    """

    labels: Sequence[str]
    codes: Mapping[str, np.ndarray]
    covered: Mapping[str, np.ndarray]
    changes: Mapping[str, np.ndarray]
    counted: np.ndarray
    kinds: Mapping[str, str]

    def pairs_of(self, source: str) -> np.ndarray:
        """Pairs that count and that the source covers, (labels, labels) bool."""
        known = self.covered[source]
        return self.counted & known[:, None] & known[None]


@dataclass(frozen=True)
class Likeness:
    """How much a source looks like the responses, over all folds.

    Attributes
    ----------
    source, kind
        Its name, and what it was made from.
    value
        Likeness in the form where it, or its lower end, is largest; NaN where no form tells anything.
    form
        That form.
    n_pairs
        Pairs of perturbations behind it.
    low
        Lower end of its interval; NaN where that could not be suspicious.
    """

    source: str
    kind: str
    value: float
    form: str
    n_pairs: int
    low: float

    @property
    def suspicious(self) -> bool:
        """Whether it looks like a copy, and not by chance."""
        return self.low >= SUSPICIOUS


def fold_evidence(
    pairs_path: str | Path, split: FoldSplit, moments: Moments, genes: pd.Index
) -> FoldEvidence:
    """Compare codes and changes of the labels of one fold, at most 80 tested ones and 80 others.

    Of a fold that holds out a context, the tested ones alone: changes in other contexts differ by more
    than the perturbation.

    Parameters
    ----------
    pairs_path
        ``pairs.h5``, for the codes.
    split
        The fold.
    moments
        Of the cells, both halves, all labels.
    genes
        Genes on which changes are compared.
    """
    labels, tested = _choose(split)
    with h5py.File(pairs_path, "r") as file:
        perturbed = file["names/perturbed_genes"].asstr()[:]
        membership = multi_hot([GENE_SEPARATOR.join(genes_of(label)) for label in labels], perturbed)
        features = {
            name: membership @ values[:].astype(np.float64) for name, values in file.get("codes", {}).items()
        }
        origins = json.loads(file.attrs.get(SOURCES, "{}"))
    halves = [moments.of(labels, genes, half)[0] for half in "ab"]
    apart = membership @ membership.T == 0
    counted = np.triu(apart & (tested[:, None] | tested[None]), 1)
    return FoldEvidence(
        labels=labels,
        codes={name: _cosines(values) for name, values in features.items()},
        covered={name: values.any(axis=1) for name, values in features.items()},
        changes=compare_halves(*halves) if features else {},
        counted=counted,
        kinds={name: origins.get(name, {}).get("kind", "") for name in features},
    )


def _choose(split: FoldSplit) -> tuple[list[str], np.ndarray]:
    """Draw labels of a fold, and say which are tested, (labels,) bool; always the same ones."""
    rng = np.random.default_rng(0)
    tested = [str(label) for label in rng.permutation(split.labels(TEST))[:MAX_TESTED]]
    rest = [] if CONTEXT in split.info else sorted(set(split.table.index) - set(split.labels(TEST)))
    others = [str(label) for label in rng.permutation(rest)[:MAX_OTHERS]]
    return [*tested, *others], np.arange(len(tested) + len(others)) < len(tested)


def compare_halves(half_a: np.ndarray, half_b: np.ndarray) -> dict[str, np.ndarray]:
    """Compare labels by their changes in each half, in several forms.

    Parameters
    ----------
    half_a, half_b
        (labels, genes) mean log-expression.

    Returns
    -------
    Form to (2, labels, labels) cosines of the changes against the mean of the labels.
    """
    changes = [half - half.mean(axis=0) for half in (half_a, half_b)]
    spread = [half.std(axis=0) for half in changes]
    forms = {
        "as they are": changes,
        "standardized": [
            np.divide(half, sd, out=np.zeros_like(half), where=sd > 1e-12)
            for half, sd in zip(changes, spread, strict=True)
        ],
    }
    left = [np.linalg.svd(half, full_matrices=False)[0] for half in changes]
    for k in COMPONENTS:
        forms[f"{k} leading components"] = [scores[:, :k] for scores in left]
    return {form: np.stack([_cosines(half) for half in pair]) for form, pair in forms.items()}


def likeness(evidence: Sequence[FoldEvidence]) -> list[Likeness]:
    """Say how much every prior source looks like the responses, folds pooled."""
    return [
        _likeness_of(name, evidence) for name in sorted({name for fold in evidence for name in fold.codes})
    ]


def _likeness_of(source: str, evidence: Sequence[FoldEvidence]) -> Likeness:
    folds = [fold for fold in evidence if source in fold.codes]
    pairs = [fold.pairs_of(source) for fold in folds]
    codes = np.concatenate([fold.codes[source][used] for fold, used in zip(folds, pairs, strict=True)])
    found = [Likeness(source, folds[0].kinds[source], np.nan, "", len(codes), np.nan)]
    for form in folds[0].changes if len(codes) >= MIN_PAIRS else ():
        halves = _pooled(folds, pairs, form)
        if _correlation(*halves) < MIN_RELIABILITY:
            continue
        value, low = _corrected(codes, halves), np.nan
        if value >= SUSPICIOUS:
            low = value - STANDARD_ERRORS * _standard_error(codes, halves, _owners(folds, pairs))
        found.append(replace(found[0], value=value, form=form, low=low))
    # A high lower end first; where there is none, a high value.
    return max(
        found, key=lambda item: (np.nan_to_num(item.low, nan=-np.inf), np.nan_to_num(item.value, nan=-9))
    )


def _pooled(folds: Sequence[FoldEvidence], pairs: Sequence[np.ndarray], form: str) -> np.ndarray:
    """Cosines of the changes of the counted pairs of all folds, (2, pairs)."""
    return np.hstack([fold.changes[form][:, used] for fold, used in zip(folds, pairs, strict=True)])


def _owners(folds: Sequence[FoldEvidence], pairs: Sequence[np.ndarray]) -> np.ndarray:
    """Both perturbations of every counted pair of all folds, (2, pairs) text."""
    names = [np.array(fold.labels, dtype=object) for fold in folds]
    return np.hstack([own[np.stack(np.nonzero(used))] for own, used in zip(names, pairs, strict=True)])


def _corrected(codes: np.ndarray, halves: np.ndarray) -> float:
    """Correlate codes (pairs,) with half B over the square root of its reliability; NaN where it has none."""
    reliability = _correlation(*halves)
    return _correlation(codes, halves[1]) / np.sqrt(reliability) if reliability > 0 else np.nan


def _standard_error(codes: np.ndarray, halves: np.ndarray, owners: np.ndarray) -> float:
    """Leave out one perturbation after the other, with all of its pairs.

    Infinite where the halves then disagree.
    """
    values = []
    labels, numbers = np.unique(owners, return_inverse=True)
    numbers = numbers.reshape(owners.shape)
    for label in range(len(labels)):
        kept = (numbers != label).all(axis=0)
        values.append(_corrected(codes[kept], halves[:, kept]))
    error = np.sqrt((len(values) - 1) * np.var(values))
    return float(error) if np.isfinite(error) else np.inf


def check_priors(evidence: Sequence[FoldEvidence]) -> list[dict[str, Any]]:
    """Give the outcome for the report: one line for all sources, and one for each that is suspicious.

    Responses in another screen look like those of this one because they are responses. Their cells were
    compared with the cells of this screen, one by one, so their likeness is stated and not judged.
    """
    found = likeness(evidence)
    if not found:
        return []
    judged = [item for item in found if item.kind != OTHER_SCREEN_RESPONSES]
    suspicious = [item for item in judged if item.suspicious]
    rows = [
        sentinel(
            f"prior source {item.source} looks like the responses of held-out perturbations themselves",
            False,
            f"likeness {item.value:.2f}, lower end {item.low:.2f} (changes {item.form}, {item.n_pairs} pairs "
            f"of perturbations); a copy of the responses has about 1, a lower end of {SUSPICIOUS} or more is "
            "suspicious. "
            "Find out what the file was made from. Responses in another screen belong in the column "
            "responses, where their cells are compared with these",
            STATISTICAL,
        )
        for item in suspicious
    ]
    rest = [item for item in found if item not in suspicious]
    if rest:
        told = [item for item in judged if item not in suspicious and np.isfinite(item.value)]
        rows.append(
            sentinel(
                "prior sources do not look like the responses of held-out perturbations",
                True if told else None,
                f"likeness, suspicious where it is {SUSPICIOUS} or more beyond its error: "
                + "; ".join(_said(item) for item in rest),
                STATISTICAL,
            )
        )
    return rows


def _said(item: Likeness) -> str:
    if not np.isfinite(item.value):
        reason = "too few pairs" if item.n_pairs < MIN_PAIRS else "the halves of the cells disagree"
        return f"{item.source} cannot be told, {reason} ({item.n_pairs})"
    said = f"{item.source} {item.value:.2f}"
    return f"{said} (measured in other cells, not judged)" if item.kind == OTHER_SCREEN_RESPONSES else said


def _cosines(values: np.ndarray) -> np.ndarray:
    """Cosines of the rows (labels, anything) with each other, (labels, labels); 0 for a row of zeros."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    unit = np.divide(values, norms, out=np.zeros_like(values), where=norms > 1e-12)
    return unit @ unit.T


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson correlation (pairs,), 0 where one side does not vary."""
    one, other = one - one.mean(), other - other.mean()
    size = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / size) if size > 1e-12 else 0.0
