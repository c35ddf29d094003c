"""Score every model's predictions of the held-out perturbations of all folds of a split."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from biojepa.contracts import (
    ALL_CATEGORIES,
    CATEGORY,
    CONTEXT,
    ENRICHMENT_COLUMNS,
    METRICS_COLUMNS,
    PERTURBATION,
    SUMMARY_COLUMNS,
    TRAIN,
    TRUST_COLUMNS,
    WHOLE_MODEL,
)
from biojepa.errors import InputError
from biojepa.evaluation.distribution import distribution_scores, observed_cells
from biojepa.evaluation.enrichment import (
    choose_gene_sets,
    choose_perturbations,
    enrichment_scores,
    enrichment_table,
    pathway_correlation,
)
from biojepa.evaluation.leakage import check_all, check_declared, unchecked
from biojepa.evaluation.metrics import METRICS, all_metrics
from biojepa.evaluation.observed import observed_means
from biojepa.evaluation.predictions import (
    FROM_CELLS,
    Prediction,
    PredictionFile,
    genes_of_fold,
    predicts_cells,
    read_prediction,
)
from biojepa.evaluation.prior_leak import FoldEvidence, check_priors, fold_evidence
from biojepa.evaluation.resampling import SEEN, UNSEEN, WholeModelScores, make_scopes
from biojepa.evaluation.scoring import check_references, score_prediction, sentinel
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.splits import FoldSplit, check_split_covers_cells
from biojepa.evaluation.statistics import CEILING, FLOOR, MetricTable, metric_tables, summarize
from biojepa.evaluation.strata import perturbation_properties, strata_table
from biojepa.evaluation.trust import effect_size_sds, effect_sizes, judge_trust, trust_table
from biojepa.evaluation.truth import FoldTruth, assemble_fold, collect_moments
from biojepa.evaluation.verdict import DECIDING, doubt, finite_or_none, reach_verdict
from biojepa.neighbours import read_prior_codes

LOGGER = logging.getLogger(__name__)
NO_CHANGE = "no_change"


@dataclass(frozen=True)
class EvaluationResult:
    """What the evaluation of one split of one dataset gives.

    Attributes
    ----------
    metrics, summary, enrichment
        Tables as described in ``contracts``.
    verdict
        Sentence, decisions per group, usability of every metric, outcome of the checks.
    observed
        Observed means, rows perturbation × fold, for the report.
    strata
        Scores by properties of the test perturbations.
    trust
        Expected and observed accuracy of the model under test.
    """

    metrics: pd.DataFrame
    summary: pd.DataFrame
    enrichment: pd.DataFrame
    verdict: dict[str, Any]
    observed: ad.AnnData
    strata: pd.DataFrame
    trust: pd.DataFrame


@dataclass(frozen=True)
class _Fold:
    """A fold's split, truth, prediction files, and what its prior codes look like."""

    split: FoldSplit
    truth: FoldTruth
    files: list[PredictionFile]
    evidence: FoldEvidence | None = None

    def load(self, file: PredictionFile, with_cells: bool = False) -> Prediction:
        """Read predictions, or make those of the two references from the truth."""
        if file.path != FROM_CELLS:
            return read_prediction(file, self.truth, self.split, with_cells)
        if file.model == CEILING:
            return Prediction(self.truth.half_a)
        return Prediction(np.tile(self.truth.perturbed_mean, (len(self.truth.perturbations), 1)))


def evaluate(
    cells_path: str | Path,
    splits: Sequence[FoldSplit],
    predictions: Sequence[PredictionFile],
    settings: EvaluationSettings | None = None,
    gene_sets: str | Path | None = None,
    pairs: Sequence[str | Path] | None = None,
) -> EvaluationResult:
    """Score predictions on the test perturbations of every fold.

    Only test rows are scored; validation rows served selection. The training mean and the technical
    duplicate, which every share of the gap refers to, are added from the cells where no file gives them.

    Parameters
    ----------
    cells_path
        ``cells.h5ad``.
    splits
        The folds, one each.
    predictions
        Files to score; every fold needs at least one.
    settings
        Defaults where not given.
    gene_sets
        GMT file; without it, no enrichment.
    pairs
        ``pairs.h5`` of each fold, in the order of ``splits``, to check what training read; None where the
        predictions were made elsewhere.

    Raises
    ------
    InputError
        If a file does not fit the split, the cells or the other models.
    LeakageError
        If training read a cell of a test perturbation, or genes, early stopping or a model used one.
    """
    settings = settings or EvaluationSettings()
    read_by_training = unchecked() if pairs is None else check_all(pairs, cells_path, splits)
    folds = _load_folds(Path(cells_path), splits, predictions, settings, pairs)
    read_by_training += [row for fold in folds for row in check_declared(fold.files, fold.split)]
    read_by_training += check_priors([fold.evidence for fold in folds if fold.evidence is not None])
    tested = pd.concat(
        [pd.DataFrame({PERTURBATION: f.truth.perturbations, CATEGORY: f.truth.categories}) for f in folds]
    )
    whole = WholeModelScores(make_scopes(tested, settings.draws, settings.seed))
    scores, sentinels = _score_all(folds, whole, settings)
    enrichment = pd.DataFrame(columns=list(ENRICHMENT_COLUMNS))
    if gene_sets is not None and settings.enrichment.max_perturbations:
        enrichment = _enrich(folds, scores, whole, gene_sets, settings)
        scores = pd.concat([scores, pathway_correlation(enrichment)], ignore_index=True)
    if settings.distribution.max_perturbations:
        compared = _compare_cells(Path(cells_path), folds, scores, whole, settings)
        scores = pd.concat([scores, compared], ignore_index=True)
    of_perturbations = scores[scores[PERTURBATION] != WHOLE_MODEL]
    tables = metric_tables(of_perturbations, whole, all_metrics(), whole.scopes)
    in_summary = [table for table in tables if table.scope.name not in (SEEN, UNSEEN)]
    # A simple model under test is compared with the others, as in the verdict.
    rivals = [name for name in settings.baselines if name != settings.model]
    summary = summarize(in_summary, rivals, settings.confidence)
    verdict = doubt(reach_verdict(tables, settings), read_by_training + sentinels)
    overall = {table.metric.name: table for table in tables if table.scope.name == ALL_CATEGORIES}
    strata, trust = _where_and_how_far(folds, of_perturbations, overall, settings, pairs)
    verdict["trust"] = finite_or_none(judge_trust(trust, settings))
    metrics = scores[list(METRICS_COLUMNS)].reset_index(drop=True)
    return EvaluationResult(
        metrics,
        summary[list(SUMMARY_COLUMNS)],
        enrichment,
        verdict,
        observed_means([fold.truth for fold in folds]),
        strata,
        trust,
    )


def _where_and_how_far(
    folds: Sequence[_Fold],
    scores: pd.DataFrame,
    overall: Mapping[str, MetricTable],
    settings: EvaluationSettings,
    pairs: Sequence[str | Path] | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score by strata, and expected against observed accuracy of the model under test."""
    codes = None if pairs is None else [read_prior_codes(path) for path in pairs]
    trained = [fold.split.labels(TRAIN) for fold in folds]
    properties = perturbation_properties([fold.truth for fold in folds], trained, codes)
    strata = strata_table(scores, overall, properties, settings)
    effects = [
        _predicted_effects(fold.truth, fold.load(file))
        for fold in folds
        for file in fold.files
        if file.model == settings.model
    ]
    trust = pd.DataFrame(columns=list(TRUST_COLUMNS))
    if effects:
        trust = trust_table(properties, pd.concat(effects, ignore_index=True), scores, settings)
    return strata, trust


def _predicted_effects(truth: FoldTruth, prediction: Prediction) -> pd.DataFrame:
    """Length of the predicted change of each test perturbation against control, and its uncertainty."""
    change = prediction.mean - truth.control_mean
    sd = np.nan if prediction.sd is None else effect_size_sds(change, prediction.sd)
    return pd.DataFrame(
        {
            PERTURBATION: truth.perturbations,
            "fold": truth.fold,
            "predicted_effect": effect_sizes(change),
            "predicted_effect_sd": sd,
        }
    )


def _load_folds(
    cells_path: Path,
    splits: Sequence[FoldSplit],
    predictions: Sequence[PredictionFile],
    settings: EvaluationSettings,
    pairs: Sequence[str | Path] | None,
) -> list[_Fold]:
    """Check splits and files against the cells, and collect the truth of every fold."""
    numbers = [split.fold for split in splits]
    if not splits or len(set(numbers)) != len(numbers):
        raise InputError("splits", f"folds {numbers}", "one split per fold", "pass each fold once")
    stray = [file for file in predictions if file.fold not in numbers]
    if stray:
        raise InputError(
            stray[0].path,
            f"fold {stray[0].fold}",
            f"one of the folds {numbers}",
            "pass the split of this fold too",
        )
    twice = pd.Series([(file.model, file.fold, file.seed) for file in predictions]).duplicated()
    if twice.any():
        file = predictions[int(np.flatnonzero(twice)[0])]
        raise InputError(
            file.path,
            f"a second file of {file.model}, fold {file.fold}, seed {file.seed}",
            "one file each",
            "give models different names",
        )
    files = {split.fold: [file for file in predictions if file.fold == split.fold] for split in splits}
    with h5py.File(cells_path, "r") as cells:
        obs = ad.io.read_elem(cells["obs"])
    for split in splits:
        check_split_covers_cells(split, obs, cells_path)
    genes = {fold: genes_of_fold(members) for fold, members in files.items()}
    union = pd.Index(sorted(set().union(*genes.values())))
    shared = None
    if any(CONTEXT not in split.info for split in splits):
        shared = collect_moments(cells_path, union, settings.half_seed)
    folds = []
    for place, split in enumerate(splits):
        # Where a context is held out, labels depend on the fold.
        moments = shared if CONTEXT not in split.info else None
        if moments is None:
            moments = collect_moments(cells_path, genes[split.fold], settings.half_seed, split.info)
        truth = assemble_fold(moments, split, genes[split.fold], settings.fdr)
        given = {file.model for file in files[split.fold]}
        built_in = [
            PredictionFile(name, split.fold, 0, FROM_CELLS) for name in (FLOOR, CEILING) if name not in given
        ]
        evidence = None if pairs is None else fold_evidence(pairs[place], split, moments, truth.genes)
        folds.append(_Fold(split, truth, files[split.fold] + built_in, evidence))
    return folds


def _score_all(
    folds: Sequence[_Fold], whole: WholeModelScores, settings: EvaluationSettings
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Score every file of every fold; return the long table and the outcome of the checks."""
    parts, sentinels = [], []
    for fold in folds:
        split = fold.split
        sentinels.append(
            sentinel(
                f"fold {split.fold}: split.tsv is the one that was frozen",
                True,
                f"SHA-256 {split.info.get('sha256', 'not given')}",
            )
        )
        for file in fold.files:
            prediction = fold.load(file)
            sentinels += check_references(file, prediction, fold.truth)
            parts.append(score_prediction(file, prediction, fold.truth, whole))
            LOGGER.info("scored %s, fold %d, seed %d", file.model, file.fold, file.seed)
        sentinels.append(
            sentinel(
                f"fold {split.fold}: every prediction has the sets of this split, and none names another",
                True,
                f"{len(fold.files)} models on {len(fold.truth.perturbations)} test perturbations",
            )
        )
    return pd.concat(parts, ignore_index=True), sentinels


def _enrich(
    folds: Sequence[_Fold],
    scores: pd.DataFrame,
    whole: WholeModelScores,
    gene_sets_path: str | Path,
    settings: EvaluationSettings,
) -> pd.DataFrame:
    """Run the enrichment for the references, the best baseline and the models asked for.

    One seed per model: the lowest.
    """
    wanted = {FLOOR, CEILING, *(settings.enrichment.models or (settings.model,))}
    best = _best_baseline(scores, whole, settings)
    wanted |= {best} if best else set()
    union = pd.Index(sorted(set().union(*(fold.truth.genes for fold in folds))))
    gene_sets = choose_gene_sets(gene_sets_path, union, settings.enrichment)
    chosen = choose_perturbations([fold.truth for fold in folds], settings.enrichment.max_perturbations)
    parts = []
    for fold in folds:
        rows, truth = chosen[fold.split.fold], fold.truth
        files = [
            file
            for file in fold.files
            if file.model in wanted and file.seed == _lowest_seed(file, fold.files)
        ]
        if not rows:
            continue
        observed = enrichment_scores(truth.delta_control[rows], truth.genes, gene_sets, settings.enrichment)
        for file in files:
            predicted = fold.load(file).mean
            parts.append(
                enrichment_table(
                    file.model, file.seed, predicted, observed, truth, rows, gene_sets, settings.enrichment
                )
            )
    return pd.concat(parts, ignore_index=True)


def _compare_cells(
    cells_path: Path,
    folds: Sequence[_Fold],
    scores: pd.DataFrame,
    whole: WholeModelScores,
    settings: EvaluationSettings,
) -> pd.DataFrame:
    """Score predicted cells of the references, the best baseline, the models asked for and those with cells.

    One seed per model: the lowest.
    """
    own = settings.distribution
    wanted = {FLOOR, CEILING, NO_CHANGE, *(own.models or (settings.model,))}
    best = _best_baseline(scores, whole, settings)
    wanted |= {best} if best else set()
    chosen = choose_perturbations([fold.truth for fold in folds], own.max_perturbations)
    pairs = [(fold.split, fold.truth) for fold in folds]
    cells = observed_cells(cells_path, pairs, chosen, own, settings.half_seed)
    parts = []
    for fold in folds:
        files = [
            (file.model, file.seed, partial(fold.load, file, with_cells=True))
            for file in fold.files
            if file.seed == _lowest_seed(file, fold.files)
            and (file.model in wanted or predicts_cells(file.path))
        ]
        parts.append(distribution_scores(fold.truth, cells[fold.truth.fold], files, CEILING, own))
    return pd.concat(parts, ignore_index=True)


def _lowest_seed(file: PredictionFile, files: Sequence[PredictionFile]) -> int:
    return min(other.seed for other in files if other.model == file.model)


def _best_baseline(scores: pd.DataFrame, whole: WholeModelScores, settings: EvaluationSettings) -> str | None:
    """Return the best simple model over all test perturbations by the first deciding metric."""
    metric = DECIDING[0]
    tables = metric_tables(
        scores[scores["metric"] == metric],
        whole,
        {metric: METRICS[metric]},
        {ALL_CATEGORIES: whole.scopes[ALL_CATEGORIES]},
    )
    return tables[0].best_baseline(settings.baselines) if tables else None
