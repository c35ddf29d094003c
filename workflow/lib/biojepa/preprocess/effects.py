"""What each perturbation did, as a description.

Everything here is computed on all cells, held-out ones included, and is for people: no number of
this module is fitted on or trained with. The flags it sets on cells may be applied to training
cells only.

Cells come in blocks and are looked at twice. While they are written: moments of genes and of
perturbations, expression of targets, and the cells that set the principal components. Once more: scores
of the cells in which effect sizes are measured, and moments of perturbations that did not fit the first
time. What is held does not grow with the cells but for one value for each target of a cell and the scores
of the cells sampled. Sums are taken entry by entry in the order of the cells, so that no result depends on
how cells are cut into blocks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Protocol

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import false_discovery_control, norm, t, ttest_ind_from_stats
from sklearn.decomposition import PCA

from biojepa.contracts import (
    BATCH,
    CONTROL,
    FLAG_FEW_GUIDES,
    FLAG_WEAK,
    FLAG_WEAK_GUIDE,
    GUIDE_ID,
    N_PERTURBED_GENES,
    PERTURBATION,
    PERTURBATION_TABLE_COLUMNS,
    PERTURBATION_TYPE,
)
from biojepa.guides import GUIDE_JOIN
from biojepa.labels import genes_of
from biojepa.preprocess.batch_effects import BatchCentred, control_weights, permute_within
from biojepa.preprocess.settings import PreprocessSettings
from biojepa.raw.matrix import CompressedRows, RowBlocks

JOIN = ";"
SIGNIFICANT = 0.05
# Added to means per 10,000 before the ratio: one UMI in a hundred cells of 10,000 UMIs.
PSEUDO_CP10K = 0.01
EXPECTED_SIGN = {"CRISPRi": -1, "CRISPRa": 1}
WEAK, ONE_GUIDE, UNCHANGED, WRONG_WAY = "weak", "one_guide", "target_unchanged", "target_wrong_direction"
# A guide is weak when it leaves more than 2^-0.5 = 71 % of its target (CRISPRi), or raises it by
# less than 41 % (CRISPRa), by a one-sided test, and enough transcripts were expected to tell.
WEAK_GUIDE_LOG2FC = 0.5
WEAK_GUIDE_P = 0.05
MIN_EXPECTED_DETECTIONS = 10
# Genes and cells that set the principal components; more changes an effect size by less than its noise.
PCA_GENES, PCA_CELLS = 2_000, 10_000
# Control cells at most that cells of a perturbation are ranked among; means are over all of them.
TEST_CONTROLS = 10_000
# Sums of genes by perturbation that are held at a time, and as many of squares: 0.5 GB together.
MOMENTS_ENTRIES = 1 << 25


class Reader(Protocol):
    """What looks at cells that come in blocks."""

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Look at the cells from ``first`` on, log-expression ``(some cells, genes)``."""
        ...


class Effects:
    """Describe perturbations from their cells, which are added in blocks.

    Parameters
    ----------
    obs
        Of all cells.
    genes
        ``(genes,)`` symbols of the columns.
    settings
        Sizes of samples, seed, permutations.
    """

    def __init__(self, obs: pd.DataFrame, genes: pd.Index, settings: PreprocessSettings) -> None:
        self._obs, self._genes, self._settings = obs, genes, settings
        # Cells of each perturbation, and of the control.
        self.rows = group_by_label(obs[PERTURBATION])
        self.control = self.rows.pop(CONTROL)
        # Cells in which effect sizes are measured, of each label and the control.
        self.sample = {
            name: sample_rows(rows, settings.effect_cells, settings.seed, name)
            for name, rows in {**self.rows, CONTROL: self.control}.items()
        }
        shape = (len(obs), len(genes))
        self.target = TargetExpression(self.rows, self.control, genes, shape[0], settings)
        self._changed = ChangedGenes(self.rows, self.control, shape)
        self._components = Components(shape, settings.effect_components, settings.seed)

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Add the cells from ``first`` on, log-expression ``(some cells, genes)``, in order."""
        self.target.add(first, expression)
        self._components.add(first, expression)
        self._changed.add(first, expression)

    def describe(
        self,
        expression: RowBlocks,
        centre: np.ndarray,
        also: Iterable[np.ndarray] = (),
        readers: Iterable[Reader] = (),
    ) -> tuple[pd.DataFrame, BatchCentred]:
        """Return the rows of perturbations.tsv, one per perturbation in sorted order, without the control.

        For combinations, ``target_measured``, ``on_target_log2fc`` and ``on_target_p`` hold one value
        per gene of the label, joined by ``;``, empty where the gene is not measured.

        Parameters
        ----------
        expression
            All cells that were added, to be read again.
        centre
            Control cells that say where their batch lies, those of the effect sizes among them.
        also
            Cells of which scores are wanted beside those in which effects are measured.
        readers
            What is to be shown the blocks as well.

        Returns
        -------
        The table, in which ``responding_share`` is missing, and the scores in principal components less the
        mean of their batch.
        """
        settings, sample = self._settings, self.sample
        self._changed.end_pass()
        scores = Scores(self._components, np.unique(np.concatenate([*sample.values(), centre, *also])))
        shown: list[Reader] = [scores, self._changed, *readers]
        for first, block in expression.blocks():
            for reader in shown:
                reader.add(first, block)
        self._changed.end_pass()
        degs = self._changed.count(expression)
        centred = BatchCentred(scores, self._obs[BATCH], centre)
        sizes = effect_sizes(centred, sample, settings)
        q_values = false_discovery_control([p for _, p in sizes.values()]) if sizes else np.array([])
        guides = targeting_guides(self._obs)
        kinds = self._obs[PERTURBATION_TYPE].astype(str).to_numpy()

        table = []
        for (name, rows), q in zip(self.rows.items(), q_values, strict=True):
            n_guides, named = guides[name]
            genes = genes_of(name)
            changes = [self.target.change(gene, rows) for gene in genes]
            size, p = sizes[name]
            top, share = self._changed.top.get(name, (None, np.nan))
            table.append(
                {
                    PERTURBATION: name,
                    N_PERTURBED_GENES: len(genes),
                    "n_cells": len(rows),
                    "n_guides": n_guides,
                    "guides": GUIDE_JOIN.join(sorted(named)),
                    "target_measured": JOIN.join(str(change is not None) for change in changes),
                    "on_target_log2fc": JOIN.join("" if c is None else f"{c[0]:.6g}" for c in changes),
                    "on_target_p": JOIN.join("" if c is None else f"{c[1]:.6g}" for c in changes),
                    "effect_size": size,
                    "effect_p": p,
                    "effect_q": q,
                    "n_deg": degs[name],
                    "top_gene": "" if top is None else str(self._genes[top]),
                    "top_gene_share": share,
                    "responding_share": np.nan,
                    "flag": JOIN.join(_flags(q, n_guides, changes, kinds[rows[0]])),
                }
            )
        return pd.DataFrame(table, columns=list(PERTURBATION_TABLE_COLUMNS)), centred

    def mean_expression(self) -> np.ndarray:
        """Return the mean log-expression of each gene ``(genes,)`` over the cells that were added."""
        return self._components.mean_expression()

    def flag_cells(self, perturbations: pd.DataFrame) -> dict[str, np.ndarray]:
        """Return flags of cells ``(cells,)``: perturbation without effect or with few guides, guide weak.

        Where no guide of a perturbation is known, it is not flagged for having few.

        A guide is judged by its target in cells of single perturbations by CRISPRi or CRISPRa; a
        knock-out need not change the transcript. Cells with several guides carry the flag of any of them.
        """
        weak = set(perturbations.loc[perturbations["effect_q"] >= SIGNIFICANT, PERTURBATION])
        n_guides = perturbations["n_guides"]
        few = (n_guides > 0) & (n_guides < self._settings.min_guides_per_perturbation)
        labels = self._obs[PERTURBATION].astype(str)
        guides = self._obs[GUIDE_ID].astype(str)
        bad = self.weak_guides
        by_guide = {joined: bool(bad & set(joined.split(GUIDE_JOIN))) for joined in guides.unique()}
        return {
            FLAG_WEAK: labels.isin(weak).to_numpy(),
            FLAG_FEW_GUIDES: labels.isin(set(perturbations.loc[few, PERTURBATION])).to_numpy(),
            FLAG_WEAK_GUIDE: guides.map(by_guide).to_numpy(dtype=bool),
        }

    @cached_property
    def weak_guides(self) -> set[str]:
        """Guides whose target hardly changes; all cells must have been added."""
        return weak_guides(self._obs, self.target, self._settings.min_cells_per_guide)


def group_by_label(labels: pd.Series) -> dict[str, np.ndarray]:
    """Return each label, in sorted order, with its cells, sorted."""
    codes, names = pd.factorize(labels.astype(str).to_numpy(dtype=object), sort=True)
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    parts = np.split(np.argsort(codes, kind="stable"), ends[:-1])
    return dict(zip(map(str, names), parts, strict=True))


def targeting_guides(obs: pd.DataFrame) -> dict[str, tuple[int, list[str]]]:
    """Return for each perturbation how many guides it has, and their names, sorted.

    Guides of control cells target nothing and do not count. What another guide targets is told by the
    labels of the cells that carry it: the genes that all of them share. The number is that of the gene with
    fewest guides; where cells carry a guide for each gene and it is not known which is for which, at most the
    guides divided by the genes.

    Parameters
    ----------
    obs
        Of all cells: ``perturbation`` and ``guide_id``.
    """
    pairs = obs[[PERTURBATION, GUIDE_ID]].astype(str).drop_duplicates()
    carried: dict[str, list[set[str]]] = {}
    for label, joined in pairs.itertuples(index=False):
        carried.setdefault(label, []).append(set(joined.split(GUIDE_JOIN)) - {""})
    of_control = set().union(*carried.get(CONTROL, []))
    named = {
        label: [guides - of_control for guides in sets] for label, sets in carried.items() if label != CONTROL
    }
    targets: dict[str, set[str]] = {}
    for label, sets in named.items():
        for guide in set().union(*sets):
            targets[guide] = targets.get(guide, set(genes_of(label))) & set(genes_of(label))
    found = {}
    for label, sets in named.items():
        genes, guides = genes_of(label), set().union(*sets)
        # A guide that no gene is left for is one of each: what it targets cannot be told.
        number = min(sum(gene in (targets[guide] or genes) for guide in guides) for gene in genes)
        if max(map(len, sets)) >= len(genes):
            number = min(number, len(guides) // len(genes))
        found[label] = max(number, min(len(guides), 1)), sorted(guides)
    return found


def _flags(q: float, n_guides: int, changes: list[tuple[float, float] | None], kind: str) -> list[str]:
    """Return what a reader should notice about a perturbation."""
    flags = [WEAK] if q >= SIGNIFICANT else []
    if n_guides == 1:
        flags.append(ONE_GUIDE)
    measured = [change for change in changes if change is not None]
    if any(p >= SIGNIFICANT for _, p in measured):
        flags.append(UNCHANGED)
    sign = EXPECTED_SIGN.get(kind, 0)
    if any(p < SIGNIFICANT and log2fc * sign < 0 for log2fc, p in measured):
        flags.append(WRONG_WAY)
    return flags


class TargetExpression:
    """Expression of the perturbed genes that are measured, in the cells that carry them and in controls.

    Parameters
    ----------
    rows_of
        Label to its cells; the genes of the labels are wanted.
    control
        Control cells.
    genes
        ``(genes,)`` symbols of the columns.
    n_cells
        All cells.
    settings
        ``target_sum`` of the normalization, and the seed.
    """

    def __init__(
        self,
        rows_of: Mapping[str, np.ndarray],
        control: np.ndarray,
        genes: pd.Index,
        n_cells: int,
        settings: PreprocessSettings,
    ) -> None:
        targets = sorted({gene for label in rows_of for gene in genes_of(label)} & set(genes))
        self._column = dict(zip(targets, genes.get_indexer(pd.Index(targets)).tolist(), strict=True))
        # On the scale of counts per 10,000, whatever the target sum.
        self._scale = 1e4 / settings.target_sum
        most = max((len(genes_of(label)) for label in rows_of), default=0)
        # Column of each target of a cell, -1 where it has none or that one is not measured; then its value.
        self._wanted = np.full((most, n_cells), -1, dtype=np.int32)
        for label, rows in rows_of.items():
            for place, gene in enumerate(genes_of(label)):
                self._wanted[place, rows] = self._column.get(gene, -1)
        self._own = np.zeros((most, n_cells), dtype=np.float32)
        self._n_control = len(control)
        self._is_control = np.zeros(n_cells, dtype=bool)
        self._is_control[control] = True
        self._total = np.zeros(len(genes))
        self._detected = np.zeros(len(genes), dtype=np.int64)
        self._reference = SampledRows(
            sample_rows(control, TEST_CONTROLS, settings.seed, "on-target test"),
            np.array(list(self._column.values()), dtype=np.int64),
        )
        self._place = {gene: number for number, gene in enumerate(self._column)}
        self._sampled: sparse.csc_matrix | None = None

    def __contains__(self, gene: str) -> bool:
        """Tell whether a gene is measured."""
        return gene in self._column

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Add a block of cells."""
        part = slice(first, first + expression.shape[0])
        for wanted, own in zip(self._wanted[:, part], self._own[:, part], strict=True):
            rows = np.flatnonzero(wanted >= 0)
            if len(rows):
                own[rows] = np.expm1(np.asarray(expression[rows, wanted[rows]])).ravel()
        controls = expression[np.flatnonzero(self._is_control[part])]
        np.add.at(self._total, controls.indices, np.expm1(controls.data).astype(np.float64))
        self._detected += np.bincount(controls.indices, minlength=len(self._detected))
        self._reference.add(first, expression)

    def change(self, gene: str, rows: np.ndarray) -> tuple[float, float] | None:
        """Return log2 fold change of means per 10,000 and two-sided Mann–Whitney p; None if not measured.

        Means are over all control cells, the test compares with at most ``TEST_CONTROLS`` of them.

        Parameters
        ----------
        gene
            A target of these cells.
        rows
            Cells of one label.
        """
        if gene not in self:
            return None
        reference, n = self._control_values(gene)
        return self.log2fc(gene, rows), rank_test(self._values(gene, rows), reference, n)

    def log2fc(self, gene: str, rows: np.ndarray) -> float:
        """Return the log2 fold change of means per 10,000 of a target of these cells."""
        control = self._total[self._column[gene]] / self._n_control * self._scale
        return float(np.log2((self._values(gene, rows).mean() + PSEUDO_CP10K) / (control + PSEUDO_CP10K)))

    def changes_less(self, gene: str, rows: np.ndarray, log2fc: float, level: float) -> bool:
        """Tell whether a target of these cells surely changes by less than ``log2fc``, in its direction.

        One-sided Welch's t of the mean per 10,000 against the control's times 2^``log2fc``, with variances
        of both groups no smaller than that of the sampled controls: a few cells that all miss a transcript,
        or all have one, have no variance.

        Parameters
        ----------
        gene
            A target of these cells.
        rows
            Two cells or more, of one label.
        log2fc
            Limit; below 0, whether the target falls by less is asked.
        level
            Of the test.
        """
        detected, n_control = self._control_values(gene)
        mean = detected.sum() / n_control
        control_variance = float(((detected - mean) ** 2).sum() + (n_control - len(detected)) * mean**2)
        control_variance /= max(n_control - 1, 1)
        values, ratio = self._values(gene, rows), 2.0**log2fc
        limit = (self._total[self._column[gene]] / self._n_control * self._scale + PSEUDO_CP10K) * ratio
        noise = max(float(values.var(ddof=1)), control_variance) / len(values)
        error = np.sqrt(noise + ratio**2 * control_variance / self._n_control)
        beyond = (values.mean() + PSEUDO_CP10K - limit) * -np.sign(log2fc)
        return bool(beyond > t.isf(level, len(values) - 1) * error)

    def detected_in_control(self, gene: str) -> float:
        """Return the share of the control cells in which a gene is detected."""
        return self._detected[self._column[gene]] / self._n_control

    def _values(self, gene: str, rows: np.ndarray) -> np.ndarray:
        """Return counts per 10,000 of a target of some cells of one label ``(len(rows),)``."""
        place = np.flatnonzero(self._wanted[:, rows[0]] == self._column[gene])[0]
        return self._own[place, rows].astype(np.float64) * self._scale

    def _control_values(self, gene: str) -> tuple[np.ndarray, int]:
        """Return counts per 10,000 of a target where it is detected in sampled controls, and their number."""
        if self._sampled is None:
            self._sampled = sparse.csc_matrix(self._reference.rows().expm1(), dtype=np.float64) * self._scale
        part = slice(*self._sampled.indptr[self._place[gene] : self._place[gene] + 2])
        return self._sampled.data[part], self._sampled.shape[0]


def rank_test(values: np.ndarray, detected: np.ndarray, n_reference: int) -> float:
    """Return the two-sided Mann–Whitney p by the normal distribution, corrected for ties and continuity.

    Zeros are all of one rank, so that those of the reference need not be there to be counted.

    Parameters
    ----------
    values
        ``(n,)`` of one group, 0 or more.
    detected
        Values of the reference that are above 0.
    n_reference
        Cells of the reference, zeros included.
    """
    n, m, total = len(values), n_reference, len(values) + n_reference
    above = values[values > 0]
    n_zero = total - len(above) - len(detected)
    _, place, ties = np.unique(np.concatenate([above, detected]), return_inverse=True, return_counts=True)
    if len(ties) + (n_zero > 0) < 2:  # all values are the same
        return 1.0
    ranks = n_zero + np.cumsum(ties) - (ties - 1) / 2
    rank_sum = ranks[place[: len(above)]].sum() + (n - len(above)) * (n_zero + 1) / 2
    u = rank_sum - n * (n + 1) / 2
    tied = sum(float(size) ** 3 - size for size in (n_zero, *ties[ties > 1]))
    variance = n * m / 12 * (total + 1 - tied / (total * (total - 1)))
    z = (max(u, n * m - u) - n * m / 2 - 0.5) / np.sqrt(variance)
    return float(min(1.0, 2 * norm.sf(z)))


class SampledRows:
    """Some cells and genes of a matrix that comes in blocks; ``rows`` sorted."""

    def __init__(self, rows: np.ndarray, columns: np.ndarray | None = None) -> None:
        self._rows, self._columns = rows, columns
        self._parts: list[sparse.csr_matrix] = []

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Add a block of cells."""
        begin, end = np.searchsorted(self._rows, [first, first + expression.shape[0]])
        part = expression[self._rows[begin:end] - first]
        self._parts.append(part if self._columns is None else part[:, self._columns])

    def rows(self) -> sparse.csr_matrix:
        """Return what was sampled of the cells added."""
        return sparse.csr_matrix(sparse.vstack(self._parts, format="csr"))


def effect_sizes(
    scores: BatchCentred, sample: Mapping[str, np.ndarray], settings: PreprocessSettings
) -> dict[str, tuple[float, float]]:
    """Return energy distance to the control and its permutation p-value for each perturbation.

    Cells are compared in principal components of their log-expression, at most ``effect_cells`` of
    a side, within their batches where these hold controls enough. Sampling and permutations depend on seed
    and name alone, so that one perturbation more does not change the others.
    """
    reference = scores.of(sample[CONTROL])
    found = {}
    for name, rows in sample.items():
        if name != CONTROL:
            rng = np.random.default_rng([settings.seed, zlib.crc32(name.encode()), 1])
            strata = scores.strata_with_control(rows, sample[CONTROL])
            found[name] = energy_test(scores.of(rows), reference, settings.permutations, rng, strata)
    return found


def sample_rows(rows: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    """Return at most ``most`` of the rows, drawn by seed and name."""
    if len(rows) <= most:
        return rows
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.sort(rng.choice(rows, most, replace=False))


class Components:
    """Principal components of log-expression, from cells that come in blocks.

    They are fitted on the most variable genes and, in a large screen, on a sample of the cells.

    Parameters
    ----------
    shape
        Cells and genes.
    n_components
        Components at most.
    seed
        Of the sample.
    """

    def __init__(self, shape: tuple[int, int], n_components: int, seed: int) -> None:
        self._n_cells, self._n_components = shape[0], n_components
        self.n_genes = shape[1]
        self._total, self._square = np.zeros((2, shape[1]))
        self._fit_on = SampledRows(sample_rows(np.arange(shape[0]), PCA_CELLS, seed, "principal components"))

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Add a block of cells."""
        data = expression.data.astype(np.float64)
        np.add.at(self._total, expression.indices, data)
        np.add.at(self._square, expression.indices, data**2)
        self._fit_on.add(first, expression)

    def mean_expression(self) -> np.ndarray:
        """Return the mean of each gene ``(genes,)``."""
        return self._total / self._n_cells

    def fit(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the genes used ``(used,)``, their components ``(components, used)`` and mean ``(used,)``."""
        variance = self._square / self._n_cells - (self._total / self._n_cells) ** 2
        genes = np.sort(np.argsort(-variance, kind="stable")[:PCA_GENES])
        part = self._fit_on.rows()[:, genes]
        n_components = min(self._n_components, len(genes), part.shape[0] - 1)
        pca = PCA(n_components, svd_solver="covariance_eigh").fit(part.toarray().astype(np.float64))
        return genes, pca.components_, pca.mean_


class Scores:
    """Scores of some cells in principal components; ``rows`` sorted, cells come in blocks."""

    def __init__(self, components: Components, rows: np.ndarray) -> None:
        self._genes, self._components, mean = components.fit()
        self._n_genes = components.n_genes
        self._shift = mean @ self._components.T
        self.rows = rows
        self._scores = np.empty((len(rows), len(self._components)))

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Add a block of cells."""
        begin, end = np.searchsorted(self.rows, [first, first + expression.shape[0]])
        part = expression[self.rows[begin:end] - first]
        part = part if len(self._genes) == part.shape[1] else part[:, self._genes]
        self._scores[begin:end] = np.asarray(part @ self._components.T) - self._shift

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the scores of some of the cells ``(len(rows), components)``."""
        return self._scores[np.searchsorted(self.rows, rows)]

    def weights_of(self, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what places any cell on some directions ``(lines, components)`` by its expression.

        Returns
        -------
        tuple of numpy.ndarray
            Weights ``(lines, genes used + 1)``, float32, the last column 0; the column of each gene
            ``(genes,)``; and what is to be subtracted ``(lines,)``.
        """
        weights = np.zeros((len(directions), len(self._genes) + 1), dtype=np.float32)
        weights[:, :-1] = directions @ self._components
        column = np.full(self._n_genes, len(self._genes))
        column[self._genes] = np.arange(len(self._genes))
        return weights, column, directions @ self._shift


def principal_components(expression: sparse.csr_matrix, n_components: int, seed: int) -> np.ndarray:
    """Return the leading principal components of log-expression ``(cells, components)``, see `Components`."""
    matrix, everything = CompressedRows.of(expression), np.arange(expression.shape[0])
    components = Components(matrix.shape, n_components, seed)
    for first, block in matrix.blocks():
        components.add(first, block)
    scores = Scores(components, everything)
    for first, block in matrix.blocks():
        scores.add(first, block)
    return scores.of(everything)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased squared-Euclidean energy distance between cells ``(n, d)`` and ``(m, d)``.

    2 E‖x−y‖² − E‖x−x'‖² − E‖y−y'‖² with E over pairs of different cells, as the E-distance of
    scPerturb (Peidli et al. 2024) without its bias. It equals twice the squared distance of the
    means less its expectation under noise, so it sees shifts and is around 0, also negative, for
    equal distributions. Unit: squared log-expression.
    """
    weights = np.concatenate([np.ones(len(x)), np.zeros(len(y))])[None]
    return float(energy_of_splits(np.concatenate([x, y]), weights)[0])


def energy_test(
    x: np.ndarray,
    y: np.ndarray,
    permutations: int,
    rng: np.random.Generator,
    strata: np.ndarray | None = None,
) -> tuple[float, float]:
    """Return the energy distance and p = (1 + permutations at least as large) / (1 + permutations).

    With strata, cells are permuted within them, and the controls weigh so that each stratum has the share of
    them that it has of the perturbed cells. The noise of a mean that is taken off a stratum then
    does not matter, which it would as soon as it comes from the same controls.

    Parameters
    ----------
    x, y
        Perturbed cells ``(n, d)`` and controls ``(m, d)``.
    permutations, rng
        How many, and what draws them.
    strata
        ``(n + m,)`` of ``x`` and then of ``y``; a stratum of perturbed cells has controls. None: one.
    """
    member = np.concatenate([np.ones(len(x)), np.zeros(len(y))])
    weight = None if strata is None else control_weights(strata, len(x))
    splits = np.vstack([member, permute_within(member, strata, permutations, rng)])
    distances = energy_of_splits(np.concatenate([x, y]), splits, weight)
    observed, null = distances[0], distances[1:]
    return float(observed), float((1 + np.sum(null >= observed)) / (1 + permutations))


def energy_of_splits(points: np.ndarray, member: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Return energy distances ``(splits,)`` of splits ``(splits, cells)`` of points ``(cells, d)``.

    With squared Euclidean distances all pairwise means follow from the two means and the mean
    squared norms, so no distance matrix is made. ``weight`` ``(cells,)`` is that of each cell where it is
    not a member, with sum 1 in each split; None: all weigh the same.
    """
    points = points - points.mean(axis=0)
    norms = (points**2).sum(axis=1)
    n = member.sum(axis=1)
    sum_x, norm_x = member @ points, member @ norms
    if weight is None:
        m = member.shape[1] - n
        mean_y, square_y = (points.sum(axis=0) - sum_x) / m[:, None], (norms.sum() - norm_x) / m
    else:
        weighted = points * weight[:, None]
        mean_y, square_y = (
            weighted.sum(axis=0) - member @ weighted,
            weight @ norms - member @ (weight * norms),
        )
        # As many cells of equal weight would have a mean as noisy.
        m = 1 / ((weight**2).sum() - member @ weight**2)
    mean_x, square_x = sum_x / n[:, None], norm_x / n
    between = square_x + square_y - 2 * (mean_x * mean_y).sum(axis=1)
    within_x = 2 * n / (n - 1) * (square_x - (mean_x**2).sum(axis=1))
    within_y = 2 * m / (m - 1) * (square_y - (mean_y**2).sum(axis=1))
    return 2 * between - within_x - within_y


class ChangedGenes:
    """Count for each perturbation the genes with Benjamini–Hochberg adjusted p < 0.05.

    Welch's t on log-expression against all control cells, adjusted over the genes of one
    perturbation, with the variance of the perturbed cells taken to be no smaller than that of the
    control. Without that floor a rare gene that fifty cells miss by chance has variance 0 there and
    counts as changed.

    Sums of ``MOMENTS_ENTRIES`` genes of perturbations are held at a time; as many passes over the cells
    are made as that takes.

    Parameters
    ----------
    rows_of
        Label to its cells.
    control
        Control cells.
    shape
        Cells and genes.
    """

    def __init__(
        self, rows_of: Mapping[str, np.ndarray], control: np.ndarray, shape: tuple[int, int]
    ) -> None:
        self._names, self._n_genes = list(rows_of), shape[1]
        self._n_cells = np.array([len(control), *(len(rows) for rows in rows_of.values())])
        # Control is 0, labels follow; -1 is looked at never.
        self._owner = np.full(shape[0], -1, dtype=np.int32)
        for code, rows in enumerate((control, *rows_of.values())):
            self._owner[rows] = code
        self._reference: tuple[np.ndarray, np.ndarray, int] | None = None
        self.found: dict[str, int] = {}
        # Of labels with a changed gene: the column of the one that changed most, and its share of the squared
        # change of all genes.
        self.top: dict[str, tuple[int, float]] = {}
        self._begin(0)

    def _begin(self, first: int) -> None:
        """Start a pass for the groups from ``first`` on."""
        self._first = first
        self._end = min(len(self._n_cells), first + max(2, MOMENTS_ENTRIES // self._n_genes))
        size = max(self._end - first, 0) * self._n_genes
        self._total, self._square = np.zeros(size), np.zeros(size)

    @property
    def done(self) -> bool:
        """Whether all perturbations are counted."""
        return self._first >= len(self._n_cells)

    def add(self, first: int, expression: sparse.csr_matrix) -> None:
        """Add a block of cells."""
        owner = self._owner[first : first + expression.shape[0]]
        wanted = (owner >= self._first) & (owner < self._end)
        part = expression if wanted.all() else expression[np.flatnonzero(wanted)]
        start = (owner[wanted] - self._first).astype(np.int64) * self._n_genes
        place = np.repeat(start, np.diff(part.indptr)) + part.indices
        data = part.data.astype(np.float64)
        np.add.at(self._total, place, data)
        np.add.at(self._square, place, data**2)

    def end_pass(self) -> None:
        """Count what the pass has summed, and begin with the next perturbations."""
        if self.done:
            return
        for code in range(self._first, self._end):
            at = slice((code - self._first) * self._n_genes, (code - self._first + 1) * self._n_genes)
            moments = _moments(self._total[at], self._square[at], int(self._n_cells[code]))
            if self._reference is None:
                self._reference = moments
            else:
                changed = _significant_genes(moments, self._reference)
                name = self._names[code - 1]
                self.found[name] = int(changed.sum())
                if changed.any():
                    square = (moments[0] - self._reference[0]) ** 2
                    top = int(np.argmax(np.where(changed, square, -1.0)))
                    self.top[name] = (top, float(square[top] / square.sum()))
        self._begin(self._end)

    def count(self, expression: RowBlocks) -> dict[str, int]:
        """Make the passes that are missing, and return the number of changed genes of each label."""
        while not self.done:
            for first, block in expression.blocks():
                self.add(first, block)
            self.end_pass()
        return self.found


def count_changed_genes(
    expression: sparse.csr_matrix, rows_of: Mapping[str, np.ndarray], control: np.ndarray
) -> dict[str, int]:
    """Count the changed genes of each label, see `ChangedGenes`."""
    return ChangedGenes(rows_of, control, expression.shape).count(CompressedRows.of(expression))


def _moments(total: np.ndarray, square: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return mean and standard deviation ``(genes,)`` from sums over ``n`` cells, and ``n``."""
    mean = total / n
    return mean, np.sqrt(np.maximum(square / n - mean**2, 0) * n / (n - 1)), n


def _significant_genes(
    perturbed: tuple[np.ndarray, np.ndarray, int], control: tuple[np.ndarray, np.ndarray, int]
) -> np.ndarray:
    """Tell which genes differ between two groups of cells ``(genes,)``, given by their moments."""
    (mean, sd, n), (mean_c, sd_c, n_c) = perturbed, control
    with np.errstate(divide="ignore", invalid="ignore"):
        p = ttest_ind_from_stats(mean, np.maximum(sd, sd_c), n, mean_c, sd_c, n_c, equal_var=False).pvalue
    # A gene that varies in neither group has no t.
    return np.asarray(false_discovery_control(np.nan_to_num(p, nan=1.0)) < SIGNIFICANT)


def weak_guides(obs: pd.DataFrame, target: TargetExpression, min_cells: int) -> set[str]:
    """Return the guides whose target surely changes by less than a guide that works would change it.

    Guides in fewer cells than ``min_cells``, and those of which too few transcripts were expected, are not
    judged.
    """
    single = ((obs[N_PERTURBED_GENES] == 1) & (obs[GUIDE_ID] != "")).to_numpy()
    names = [PERTURBATION, GUIDE_ID, PERTURBATION_TYPE]
    numbered = pd.DataFrame({name: obs[name].astype(str) for name in names}).assign(row=np.arange(len(obs)))
    found = set()
    for key, group in numbered[single].groupby(names):
        gene, guide, kind = (str(part) for part in key)
        sign = EXPECTED_SIGN.get(kind, 0)
        if not sign or gene not in target or GUIDE_JOIN in guide or len(group) < min_cells:
            continue
        expected = target.detected_in_control(gene) * len(group)
        if expected < MIN_EXPECTED_DETECTIONS:
            continue
        limit = sign * WEAK_GUIDE_LOG2FC
        if target.changes_less(gene, group["row"].to_numpy(), limit, WEAK_GUIDE_P):
            found.add(guide)
    return found
