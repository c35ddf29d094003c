"""Say in words what the comparison shows, by fixed rules.

Rules, applied to all test perturbations and separately to those made of seen genes (a combination,
or a single whose gene was trained in a combination) and to those of unseen genes:

1. Fewer test perturbations than ``min_perturbations``: *this dataset cannot tell*.
2. A metric is usable where the technical duplicate beats the training mean, that is, the confidence
   interval of their difference lies above 0. If neither ``pearson_delta_perturbed_mean`` nor
   ``rank_l2`` is usable: *this dataset cannot tell*.
3. The first usable one of these two decides, by the paired bootstrap interval of the mean difference
   to the best simple baseline: above 0 *better than*, below 0 *worse than*, otherwise
   *indistinguishable from*.
4. If the other is usable too and says the opposite, the outcome is *indistinguishable from*, and the
   text says that the metrics disagree.
5. Where a check finds a sign of a leak, the outcome is *a leak is suspected*, whatever the scores are.

The best baseline is the one with the best mean on the deciding metric in that group, chosen on the
test perturbations, which favours the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from biojepa.contracts import ALL_CATEGORIES, STATISTICAL
from biojepa.evaluation.resampling import SEEN, UNSEEN
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.statistics import CEILING, FLOOR, MetricTable, paired_difference

DECIDING = ("pearson_delta_perturbed_mean", "rank_l2")
BETTER, SAME, WORSE = "better than", "indistinguishable from", "worse than"
CANNOT_TELL, NOT_EVALUATED = "this dataset cannot tell", "not evaluated"
SUSPECTED = "a leak is suspected"
# Differences below this are nothing but rounding.
SMALLEST_SHOWN = 5e-5
_GROUPS = {ALL_CATEGORIES: "held-out perturbations", SEEN: f"of {SEEN}", UNSEEN: f"of {UNSEEN}"}
_WHAT = {
    "pearson_delta_perturbed_mean": "correlation of the change against the training perturbed mean",
    "rank_l2": "discrimination rank",
}


@dataclass(frozen=True)
class Comparison:
    """The model against the best simple baseline on one metric in one group."""

    metric: str
    best_baseline: str
    n: int
    score: float
    baseline_score: float
    difference: float
    ci_low: float
    ci_high: float
    gap_closed: float

    @property
    def outcome(self) -> str:
        """Return the outcome that the interval of the difference alone supports."""
        if self.ci_low > 0:
            return BETTER
        return WORSE if self.ci_high < 0 else SAME


def usable(table: MetricTable, confidence: float) -> bool | None:
    """Say whether the duplicate beats the mean baseline beyond doubt; None where either is missing."""
    low = table.dynamic_range(confidence)[1]
    return None if math.isnan(low) else low > 0


def compare(table: MetricTable, settings: EvaluationSettings) -> Comparison | None:
    """Compare the model under test with the best simple baseline; None where either is missing."""
    best = table.best_baseline([name for name in settings.baselines if name != settings.model])
    column = table.column(settings.model)
    if best is None or column is None:
        return None
    difference, low, high = paired_difference(table, settings.model, best, settings.confidence)
    return Comparison(
        table.metric.name,
        best,
        int(table.n[column]),
        float(table.mean[column]),
        float(table.mean[table.models.index(best)]),
        difference,
        low,
        high,
        float(table.gap_closed(settings.confidence)[0][column]),
    )


def decide(tables: Sequence[MetricTable], scope: str, settings: EvaluationSettings) -> dict[str, Any]:
    """Apply the rules to one group of perturbations.

    Returns
    -------
    dict
        ``scope``, ``n``, ``outcome``, ``text`` and, where one was made, the ``comparisons``.
    """
    found = {table.metric.name: table for table in tables if table.scope.name == scope}
    n = max((len(table.scope.perturbations) for table in found.values()), default=0)
    n_units = max((table.scope.n_units for table in found.values()), default=0)
    answer: dict[str, Any] = {"scope": scope, "n": n, "comparisons": []}
    group = f"{n} held-out perturbations" + ("" if scope == ALL_CATEGORIES else f" {_GROUPS[scope]}")
    if n_units < settings.min_perturbations:
        text = f"On {group}, {CANNOT_TELL}: the verdict asks for at least {settings.min_perturbations}."
        return {**answer, "outcome": CANNOT_TELL, "text": text}
    candidates = [
        found[name] for name in DECIDING if name in found and usable(found[name], settings.confidence)
    ]
    if not candidates:
        text = (
            f"On {group}, {CANNOT_TELL}: by neither {' nor '.join(DECIDING)} is a technical duplicate "
            "distinguishable from the training mean."
        )
        return {**answer, "outcome": CANNOT_TELL, "text": text}
    comparisons = [made for table in candidates if (made := compare(table, settings)) is not None]
    if not comparisons:
        text = f"On {group}, {settings.model} was {NOT_EVALUATED}: it or every simple baseline is missing."
        return {**answer, "outcome": NOT_EVALUATED, "text": text}
    outcome, disagree = comparisons[0].outcome, False
    if {made.outcome for made in comparisons} >= {BETTER, WORSE}:
        outcome, disagree = SAME, True
    answer["comparisons"] = [{**asdict(made), "outcome": made.outcome} for made in comparisons]
    return {**answer, "outcome": outcome, "text": _sentence(comparisons, outcome, disagree, group, settings)}


def _sentence(
    comparisons: Sequence[Comparison], outcome: str, disagree: bool, group: str, settings: EvaluationSettings
) -> str:
    """Put the outcome of one group into one or two sentences with its numbers."""
    first = comparisons[0]
    text = (
        f"On {group}, {settings.model} is {outcome} the best simple baseline ({first.best_baseline}): "
        f"{_WHAT[first.metric]} {_shown(first.score)} against {_shown(first.baseline_score)}, "
        f"difference {_signed(first.difference)} "
        f"({100 * settings.confidence:.6g}% CI {_signed(first.ci_low)} to {_signed(first.ci_high)})."
    )
    if math.isfinite(first.gap_closed):
        text += (
            f" It covers {_shown(100 * first.gap_closed, 0)}% of the way from the training mean to a "
            "technical duplicate."
        )
    if disagree:
        text += f" The metrics disagree: by {_WHAT[comparisons[1].metric]} it is {comparisons[1].outcome} it."
    return text


def _shown(value: float, digits: int = 2) -> str:
    """Return a number with fixed decimals; what rounds to nothing has no sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def _signed(value: float) -> str:
    """Return a difference with its sign and two decimals, more where two would hide on which side of 0 it is.

    The ends of an interval decide by their side of 0, so that +0.00 or -0.00 would not explain the outcome.
    """
    if abs(value) < SMALLEST_SHOWN:
        return "0.00"
    return f"{value:+.2f}" if abs(value) >= 0.005 else f"{value:+.1g}"


def reach_verdict(tables: Sequence[MetricTable], settings: EvaluationSettings) -> dict[str, Any]:
    """Return the verdict: a sentence, one decision per group, and what every metric can tell here.

    Parameters
    ----------
    tables
        Pooled scores of every metric and scope.
    settings
        Model under test, baselines, level, and the least number of perturbations.

    Returns
    -------
    dict
        ``sentence`` and ``outcome`` over all test perturbations; ``details``, one decision per group;
        ``usable`` and ``dynamic_range`` per metric over all, and ``dynamic_range_by_category``.
        Missing numbers are None, so that it can be written as JSON.
    """
    scopes = {table.scope.name for table in tables}
    details = [decide(tables, name, settings) for name in _GROUPS if name in scopes]
    ranges: dict[str, dict[str, dict[str, Any]]] = {}
    for table in tables:
        best, low, high = table.dynamic_range(settings.confidence)
        entry = {"mean": best, "low": low, "high": high, "usable": usable(table, settings.confidence)}
        ranges.setdefault(table.scope.name, {})[table.metric.name] = entry
    overall = ranges.get(ALL_CATEGORIES, {})
    main = next((entry for entry in details if entry["scope"] == ALL_CATEGORIES), None)
    verdict = {
        "model": settings.model,
        "outcome": main["outcome"] if main else NOT_EVALUATED,
        "sentence": main["text"] if main else "No test perturbation was scored.",
        "details": details,
        "usable": {metric: entry["usable"] for metric, entry in overall.items()},
        "dynamic_range": overall,
        "dynamic_range_by_category": {
            name: entry for name, entry in ranges.items() if name != ALL_CATEGORIES
        },
        "rule": f"interval of the paired difference on {' then '.join(DECIDING)}; usable where {CEILING} "
        f"beats {FLOOR}; at least {settings.min_perturbations} perturbations",
    }
    return finite_or_none(verdict)


def doubt(verdict: dict[str, Any], sentinels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the outcome of the checks to a verdict, which a sign of a leak overrules.

    Returns
    -------
    The verdict with ``sentinels``. Where a statistical check failed, its ``outcome`` and ``sentence`` say so,
    and ``unless_leaked`` holds what they were.
    """
    verdict = {**verdict, "sentinels": finite_or_none(list(sentinels))}
    signs = [item for item in sentinels if item["kind"] == STATISTICAL and item["passed"] is False]
    if not signs:
        return verdict
    named = "; ".join(str(item["check"]) for item in signs)
    return {
        **verdict,
        "outcome": SUSPECTED,
        "sentence": f"A leak is suspected, so the scores are not to be believed until its origin is known: "
        f"{named}. If it is no leak: {verdict['sentence']}",
        "unless_leaked": {"outcome": verdict["outcome"], "sentence": verdict["sentence"]},
    }


def finite_or_none(content: Any) -> Any:
    """Replace NaN and infinity by None throughout nested dicts and lists: JSON has no NaN."""
    if isinstance(content, dict):
        return {key: finite_or_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite_or_none(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
