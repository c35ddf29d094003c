"""Predict perturbations outside a screen, and say of each how far to trust it.

The model was trained on everything, so nothing can be held out to judge it. What to expect of a
prediction is what the same model, trained on folds of the same screen, reached on held-out
perturbations of the same kind: the same category, and as many genes that training had seen; see
:func:`held_out_accuracy`. It averages all seeds, while the model that predicts has the first one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd

from biojepa.contracts import (
    CATEGORIES,
    CATEGORY,
    PERTURBATION,
    PREDICTED_COLUMNS,
    WHOLE_MODEL,
)
from biojepa.errors import InputError
from biojepa.evaluation.resampling import bootstrap_means, interval
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.trust import (
    FROM_FEATURES,
    FROM_KIND,
    Expectation,
    Kind,
    effect_size_sds,
    effect_sizes,
)
from biojepa.labels import genes_of
from biojepa.neighbours import (
    CodedGenes,
    blocks,
    coverage_share,
    covered_genes,
    covering_sources,
    nearest_columns,
    nearest_training_genes,
)
from biojepa.pairs import Pairs, multi_hot, trainable_labels
from biojepa.prediction_requests import ALL
from biojepa.splits import SeenGenes

METRIC = "pearson_delta_perturbed_mean"
UNINFORMED = ("mean", "no_change")
"""Baselines that predict the same whatever is perturbed."""
MEASURED = "measured"
"""Category of a perturbation of the screen itself, which no category of unseen ones fits."""
N_TOP = 10
PREDICTED_AT_A_TIME = 256


class PredictingModel(Protocol):
    """What is asked of a model: see ``TrainedModel``."""

    genes: tuple[str, ...]
    perturbed_genes: tuple[str, ...]
    facts: Mapping[str, Any]
    control_expression: Any

    @property
    def codes(self) -> Mapping[str, Any]:
        """Codes that the model uses, as tensors: source to (perturbed genes, dim)."""

    def predict_membership(self, membership: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Predict multi-hot codes (n, perturbed genes): expression, its sd or None, tokens."""


@dataclass(frozen=True)
class HeldOut:
    """What a model reached on held-out perturbations of one kind.

    Attributes
    ----------
    n
        Perturbations.
    accuracy
        Mean Pearson correlation of changes against the training perturbed mean.
    baseline, baseline_accuracy
        Best simple model of that kind, and the same for it.
    gain
        Mean gain over it and its bootstrap interval.
    uninformed, uninformed_gain
        Better of the baselines that know nothing of the perturbation, and the gain over that one.
    """

    n: int
    accuracy: float
    baseline: str
    baseline_accuracy: float
    gain: tuple[float, float, float]
    uninformed: str
    uninformed_gain: tuple[float, float, float]


@dataclass(frozen=True)
class Predictions:
    """Answer to what was asked for.

    Attributes
    ----------
    table
        Columns ``contracts.PREDICTED_COLUMNS``: predicted perturbations by falling effect size, then
        those that were not predicted, without numbers.
    genes
        Of the columns of ``expression``.
    expression, sd
        (predicted rows, genes) mean log-expression and, where the model gives one, its standard
        deviation, float32, in the order of the table.
    """

    table: pd.DataFrame
    genes: tuple[str, ...]
    expression: np.ndarray
    sd: np.ndarray | None


def held_out_accuracy(
    metrics: pd.DataFrame,
    summary: pd.DataFrame,
    model: str,
    settings: EvaluationSettings,
    splits: Mapping[int, pd.DataFrame],
) -> dict[Kind, HeldOut]:
    """Collect what a model reached on held-out perturbations, by category and number of genes seen.

    A category of combinations counts partners that were trained on their own. Whether the others
    occurred in a training combination, or were never seen at all, makes another kind: a pair of new genes
    must not be trusted for what pairs of well-known ones reached.

    Two baselines answer two questions. *Is there anything better to use?* is asked of the best simple
    model, whose name and accuracy stand beside the model's. *Does the prediction say anything about this
    perturbation?* is asked of the better of ``mean`` and ``no_change``: they predict the same whatever is
    perturbed. It is the second that decides on abstaining. A model that is as good as the best simple
    one, and far better than knowing nothing, is worth reading; one that is not, is not. ``mean`` alone
    would be too weak a bar: it scores 0 by definition, and *no change* often scores more. A model that is
    clearly worse than the best simple one is abstained from as well: that one is the better answer.

    Parameters
    ----------
    metrics, summary
        Tables of ``evaluate``.
    model
        Name of the model.
    settings
        Of the evaluation: number and seed of bootstrap draws over perturbations, confidence.
    splits
        Fold to its ``split.tsv``, which says how many genes of a held-out perturbation were seen.

    Raises
    ------
    InputError
        When the model, or every uninformed baseline, is not in the tables, or a scored perturbation is
        not in the split of its fold.
    """
    rows = metrics[(metrics["metric"] == METRIC) & (metrics[PERTURBATION] != WHOLE_MODEL)]
    found = set(rows["model"])
    if model not in found or not found & set(UNINFORMED):
        raise InputError(
            "metrics.tsv",
            f"{METRIC} of {', '.join(sorted(found)) or 'no model'}",
            f"that of {model} and of {' or '.join(UNINFORMED)}",
            f"add them to models in the config, and rerun the rule evaluate for {model}",
        )
    best = summary[(summary["metric"] == METRIC) & (summary["model"] == model)].set_index(CATEGORY)
    n_seen = _genes_seen(rows, splits)
    reached = {}
    for category, n_genes_seen in sorted(
        set(zip(rows[CATEGORY], n_seen, strict=True)), key=lambda kind: (CATEGORIES.index(kind[0]), kind[1])
    ):
        inside = rows[(rows[CATEGORY] == category) & (n_seen == n_genes_seen)]
        scores = inside.groupby([PERTURBATION, "model"], observed=True)["value"].mean().unstack("model")
        if model not in scores or scores[model].isna().all():
            continue
        scores = scores[scores[model].notna()]
        uninformed = max(
            (name for name in UNINFORMED if name in scores), key=lambda name: scores[name].mean()
        )
        # The best over the whole category, and missing where no simple model was run but the mean.
        named = best["best_baseline"].get(category) if "best_baseline" in best else None
        baseline = named if isinstance(named, str) and named in scores else uninformed
        rng = np.random.default_rng([settings.seed, CATEGORIES.index(category), n_genes_seen])
        n = len(scores)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=settings.draws).astype(float)
        gains = {
            other: _gain(scores[model] - scores[other], counts, settings.confidence)
            for other in (baseline, uninformed)
        }
        reached[category, n_genes_seen] = HeldOut(
            n=n,
            accuracy=float(scores[model].mean()),
            baseline=baseline,
            baseline_accuracy=float(scores[baseline].mean()),
            gain=gains[baseline],
            uninformed=uninformed,
            uninformed_gain=gains[uninformed],
        )
    return reached


def _genes_seen(rows: pd.DataFrame, splits: Mapping[int, pd.DataFrame]) -> np.ndarray:
    """Count (rows,) the genes of each scored perturbation that training of its fold had seen."""
    seen = {
        (fold, label): n
        for fold, table in splits.items()
        for label, n in zip(table[PERTURBATION], table["n_genes_seen"], strict=True)
    }
    scored = list(zip(rows["fold"], rows[PERTURBATION], strict=True))
    unknown = [kind for kind in scored if kind not in seen]
    if unknown:
        raise InputError(
            "metrics.tsv",
            f"{unknown[0][1]} of fold {unknown[0][0]}",
            "a perturbation of that fold's split.tsv",
            "rerun the evaluate stage",
        )
    return np.array([seen[kind] for kind in scored], dtype=np.int64)


def _gain(difference: pd.Series, counts: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Average a difference, with its percentile interval over bootstrap samples of perturbations."""
    values = difference.to_numpy(float)[:, None]
    if len(values) < 2:
        # One perturbation resamples to itself: an interval of width 0 would claim certainty.
        return float(values.mean()), math.nan, math.nan
    low, high = interval(bootstrap_means(values, counts), confidence)
    return float(np.nanmean(values)), float(low[0]), float(high[0])


def predict_perturbations(
    model: PredictingModel,
    pairs: Pairs,
    requests: Sequence[str] | str,
    held_out: Mapping[Kind, HeldOut],
    min_perturbations: int = 8,
    expectation: Expectation | None = None,
) -> Predictions:
    """Predict perturbations, rank them by effect size, and say of each how far to trust it.

    A perturbation is predicted when each of its genes is carried by a training perturbation or covered by
    a prior source. Others are listed as not predicted: to a model a gene without any code is an average
    gene, and to the reader that would be a made-up answer.

    Parameters
    ----------
    model
        Trained on ``pairs``.
    pairs
        Of the scheme ``none``, with codes of the genes that are asked for.
    requests
        Perturbations as :func:`~biojepa.prediction_requests.read_requests` gives them, or ``ALL``.
    held_out
        From :func:`held_out_accuracy`.
    min_perturbations
        Held-out perturbations of a kind below which nothing is claimed of the kind.
    expectation
        What accuracy to expect of a perturbation from what is known of it; None where too few were held
        out to learn that.

    Raises
    ------
    InputError
        When the model was trained on another file than ``pairs``, or nothing asked for can be predicted.
    """
    made_with, here = model.facts.get("split_sha256"), pairs.facts.get("split_sha256")
    if made_with != here or model.perturbed_genes != pairs.perturbed_genes:
        raise InputError(
            "model.pt",
            f"a model of the split {made_with} with codes of {len(model.perturbed_genes)} genes",
            f"the split {here} and the {len(pairs.perturbed_genes)} genes of pairs.h5",
            "rerun the train stage",
        )
    on_file = pairs
    # What the model uses counts, whatever the file says: it may know no source, or have shuffled the codes.
    pairs = replace(pairs, codes={name: np.asarray(codes.cpu()) for name, codes in model.codes.items()})
    training = {pairs.labels[label] for label in trainable_labels(pairs)}
    seen = SeenGenes.of(training)
    trained = set(seen.counts)
    covered = covered_genes(pairs)
    coded = set().union(*covered.values())
    asked = sorted(coded) if isinstance(requests, str) and requests == ALL else list(requests)
    known = trained | coded
    predicted = [label for label in asked if known.issuperset(genes_of(label))]
    missing = [label for label in asked if not known.issuperset(genes_of(label))]
    if not predicted:
        raise InputError(
            "config, key predict",
            f"nothing that can be predicted: {', '.join(missing[:10]) or 'no gene with a code'}",
            "genes that the screen perturbed, or that a prior source of the model relates to these",
            "correct the symbols, or give the dataset a prior source that knows them",
        )

    nearest = nearest_training_genes(
        pairs, {gene for label in predicted for gene in genes_of(label)}, trained
    )
    expression, sd = _expression(model, predicted)
    change = expression - np.asarray(model.control_expression.cpu(), dtype=np.float32)
    size = effect_sizes(change)
    size_sd = np.full(len(size), np.nan) if sd is None else effect_size_sds(change, sd)
    order = np.argsort(-size, kind="stable")
    kinds = [(MEASURED, 0) if label in training else seen.categorize(label) for label in predicted]
    expected = _expected(expectation, _known_beforehand(on_file, predicted, kinds, trained, size, size_sd))
    rows = []
    for rank, place in enumerate(order, start=1):
        label, kind = predicted[place], kinds[place]
        rows.append(
            {
                "rank": rank,
                PERTURBATION: label,
                CATEGORY: kind[0],
                "effect_size": size[place],
                "effect_size_sd": size_sd[place],
                "top_up": _top(change[place], model.genes),
                "top_down": _top(-change[place], model.genes, sign=-1),
                **nearest_columns(label, nearest),
                **_coverage_columns(label, covered),
                **_with_expected(
                    _trust_columns(kind[0], held_out.get(kind), min_perturbations), expected[place]
                ),
            }
        )
    symbols = sorted({*pairs.perturbed_genes, *pairs.genes})
    for label in missing:
        unknown = [gene for gene in genes_of(label) if gene not in known]
        rows.append(
            {
                PERTURBATION: label,
                CATEGORY: seen.categorize(label)[0],
                **_coverage_columns(label, covered),
                "abstain": True,
                "trust": "not predicted: no prior source knows "
                + " and ".join(gene + _suggestion(gene, symbols) for gene in unknown),
            }
        )
    table = pd.DataFrame(rows, columns=list(PREDICTED_COLUMNS))
    table = table.astype({"rank": "Int64", "heldout_n": "Int64", "abstain": bool})
    return Predictions(table, model.genes, expression[order], None if sd is None else sd[order])


def _expression(model: PredictingModel, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Predict labels, a block at a time: with the codes of all genes, a multi-hot matrix is wide."""
    expression = np.zeros((len(labels), len(model.genes)), dtype=np.float32)
    sd: np.ndarray | None = None
    for block in blocks(len(labels), PREDICTED_AT_A_TIME):
        membership = multi_hot(labels[block], model.perturbed_genes).astype(np.float32)
        mean, deviation, _ = model.predict_membership(membership)
        expression[block] = mean
        if deviation is not None:
            sd = np.zeros_like(expression) if sd is None else sd
            sd[block] = deviation
    return expression, sd


def _top(change: np.ndarray, genes: Sequence[str], sign: int = 1) -> str:
    """Write down the genes with the largest positive ``change``, with ``sign`` as it was."""
    order = np.argsort(-change, kind="stable")[:N_TOP]
    return ";".join(f"{genes[gene]}:{sign * change[gene]:+.3g}" for gene in order if change[gene] > 0)


def _coverage_columns(label: str, covered: Mapping[str, set[str]]) -> dict[str, str]:
    """Name the sources that cover every gene of a label."""
    names = covering_sources(label, covered)
    return {"prior_coverage": f"{len(names)}/{len(covered)}", "prior_sources": ";".join(names)}


def _trust_columns(category: str, held_out: HeldOut | None, min_perturbations: int) -> dict[str, Any]:
    """Say in numbers and words how far to trust a prediction of a category."""
    if category == MEASURED:
        words = "measured in this screen, and the model was trained on it: look at the measurement first"
        return {"abstain": False, "trust": words}
    if held_out is None:
        return {"abstain": True, "trust": "no held-out perturbation of this kind: untested"}
    numbers = {
        "heldout_accuracy": held_out.accuracy,
        "heldout_n": held_out.n,
        "baseline": held_out.baseline,
        "baseline_accuracy": held_out.baseline_accuracy,
        **dict(zip(("gain", "gain_ci_low", "gain_ci_high"), held_out.gain, strict=True)),
        "uninformed_baseline": held_out.uninformed,
        **dict(
            zip(
                ("uninformed_gain", "uninformed_gain_ci_low", "uninformed_gain_ci_high"),
                held_out.uninformed_gain,
                strict=True,
            )
        ),
    }
    kind = "on held-out perturbations of this kind"
    if held_out.n < min_perturbations:
        words = f"only {held_out.n} held-out perturbation(s) of this kind: untested"
        return {**numbers, "abstain": True, "trust": words}
    if held_out.gain[2] < 0:
        words = f"worse than {held_out.baseline} {kind}: use that instead"
        return {**numbers, "abstain": True, "trust": words}
    if not held_out.uninformed_gain[1] > 0:
        words = (
            f"no better than {held_out.uninformed}, which knows nothing of the perturbation, {kind}: abstain"
        )
        return {**numbers, "abstain": True, "trust": words}
    if held_out.gain[1] > 0:
        words = f"better than the best simple model {kind}"
    else:
        words = f"no better than the best simple model, {held_out.baseline}, {kind}, "
        words += f"but better than {held_out.uninformed}, which knows nothing of the perturbation"
    return {**numbers, "abstain": False, "trust": words}


def _known_beforehand(
    on_file: CodedGenes,
    labels: Sequence[str],
    kinds: Sequence[Kind],
    trained: set[str],
    size: np.ndarray,
    size_sd: np.ndarray,
) -> pd.DataFrame:
    """Describe perturbations as ``trust.tsv`` describes held-out ones, by the codes of ``pairs.h5``.

    Neighbours are those of the codes on file, as in ``evaluate``, and not those of the codes that the
    model uses: the relation was fitted with them.
    """
    nearest = nearest_training_genes(on_file, {gene for label in labels for gene in genes_of(label)}, trained)
    covered = covered_genes(on_file)
    return pd.DataFrame(
        {
            PERTURBATION: labels,
            CATEGORY: [category for category, _ in kinds],
            "n_genes_seen": [n for _, n in kinds],
            "nearest_similarity": [nearest_columns(label, nearest)["nearest_similarity"] for label in labels],
            "prior_coverage": [coverage_share(label, covered) for label in labels],
            "predicted_effect": size,
            "predicted_effect_sd": size_sd,
        }
    )


def _expected(expectation: Expectation | None, known: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the columns of expected accuracy for each perturbation, none where none was fitted."""
    if expectation is None:
        return [{} for _ in range(len(known))]
    return [
        {}
        if pd.isna(row["expected"])
        else {
            "expected_accuracy": row["expected"],
            "expected_low": row["low"],
            "expected_high": row["high"],
            "expected_from": expectation.source,
        }
        for row in expectation.columns(known).to_dict("records")
    ]


_EXPECTED_WORDS = {
    FROM_FEATURES: "; its expected accuracy follows from its kind, neighbours and predicted effect",
    FROM_KIND: "; its expected accuracy is the mean of the kind, since nothing else told good from bad "
    "held-out predictions",
}


def _with_expected(said: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Add the expected accuracy to what is said of trust; in words where the prediction may be used."""
    if expected and not said["abstain"]:
        said = {**said, "trust": said["trust"] + _EXPECTED_WORDS[expected["expected_from"]]}
    return {**said, **expected}


def _suggestion(gene: str, symbols: Sequence[str]) -> str:
    """Guess what a symbol that nothing knows was meant to be; empty for one that the screen measures."""
    near = [] if gene in symbols else difflib.get_close_matches(gene, symbols, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""
