"""The first screen: the verdict, what it means for the reader, and the model beside what it must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from biojepa import contracts
from biojepa.evaluation.verdict import BETTER, CANNOT_TELL, NOT_EVALUATED, SAME, SUSPECTED, WORSE
from biojepa.report.glossary import MetricText, ModelText, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import (
    MISSING,
    MetricColumn,
    ScoreCell,
    format_count,
    format_number,
    format_p,
    format_percent,
    ranked_among,
)

# Tone and heading by the outcome that the verdict's rules gave.
OUTCOMES = {
    BETTER: ("good", "Better than the best baseline"),
    SAME: ("even", "Indistinguishable from the best baseline"),
    WORSE: ("bad", "Worse than the best baseline"),
    CANNOT_TELL: ("open", "This dataset cannot tell"),
    NOT_EVALUATED: ("open", "Not evaluated"),
    SUSPECTED: ("bad", "A leak is suspected"),
}
# What a reader may do after each outcome; the model under test, then the best simple baseline.
_ADVICE = {
    BETTER: "For perturbations like the held-out ones, {model} says more than the best simple baseline "
    "({baseline}). How much to trust a single prediction is in the sections below.",
    SAME: "Nothing here speaks for {model} over {baseline}, which is simpler: on these perturbations the two "
    "cannot be told apart.",
    WORSE: "Do not use {model} on perturbations like these: {baseline}, which is simpler, is better.",
    CANNOT_TELL: "Do not conclude anything about {model} from this dataset. More held-out perturbations, or "
    "more cells of each, are needed before models can be told apart.",
    NOT_EVALUATED: "Nothing is known here about how well {model} predicts.",
    SUSPECTED: "Do not quote any score of this page. Find out what the named file was made from, or take it "
    "out of the table of datasets and run again.",
}


@dataclass(frozen=True)
class DecisionRow:
    """One headline metric: the model under test beside the best baseline and both ends of the scale.

    ``n`` is how many perturbations the model was scored on, ``among`` of a rank how many truths a fold has;
    ``gap_interval``, ``q``, ``win`` and ``harm`` are texts; ``floor`` and ``ceiling`` are the scores of
    the training mean and of the technical duplicate.
    """

    metric: MetricText
    usable: bool
    n: str
    among: str
    model: ScoreCell
    gap_interval: str
    baseline: ScoreCell
    baseline_model: ModelText | None
    q: str
    win: str
    harm: str
    floor: str
    ceiling: str


def decision_rows(inputs: ReportInputs) -> list[DecisionRow]:
    """Return one row per headline metric, over all held-out perturbations."""
    lead = model_text(inputs.lead_model, inputs.lead_model)
    rows = []
    for name in inputs.headline_metrics:
        column = MetricColumn.of(inputs, name, contracts.ALL_CATEGORIES)
        best = model_text(column.baseline, inputs.lead_model) if column.baseline else None
        own = column.rows.get(lead.name, {})
        low, high = format_percent(own.get("gap_ci_low")), format_percent(own.get("gap_ci_high"))
        ends = [
            format_number(column.rows.get(end, {}).get("mean"), column.digits)
            for end in ("mean", "duplicate")
        ]
        rows.append(
            DecisionRow(
                metric=column.text,
                usable=inputs.usable(name),
                n=format_count(own.get("n")),
                among=ranked_among(inputs, name),
                model=column.cell(lead),
                gap_interval="" if MISSING in (low, high) else f"{low} to {high}",
                baseline=column.cell(best or lead),
                baseline_model=best,
                q=format_p(own.get("q_vs_best_baseline")),
                win=format_percent(own.get("win_rate")),
                harm=format_percent(own.get("harm_rate")),
                floor=ends[0],
                ceiling=ends[1],
            )
        )
    return rows


def verdict_view(inputs: ReportInputs) -> dict[str, Any]:
    """Return the verdict as the page shows it; a file without a sentence says so."""
    verdict = inputs.verdict
    outcome = str(verdict.get("outcome"))
    tone, label = OUTCOMES.get(outcome, ("open", ""))
    details = [item for item in verdict.get("details", []) if item.get("text")]
    return {
        "sentence": verdict.get("sentence") or "No verdict was recorded for this evaluation.",
        "advice": _advice(inputs, outcome),
        "details": [
            {"scope": item["scope"], "text": item["text"], "brief": _brief(item)}
            for item in details
            if item.get("scope") != contracts.ALL_CATEGORIES
        ],
        "tone": tone,
        "label": label,
        "latent": _latent_share(inputs),
        "unusable": [name for name in inputs.headline_metrics if not inputs.usable(name)],
        "rule": verdict.get("rule", ""),
        "failed_checks": [item["check"] for item in inputs.sentinels if item["passed"] is False],
    }


def _advice(inputs: ReportInputs, outcome: str) -> str:
    """Say what the outcome means for a reader, with the baseline that the verdict compared with."""
    if outcome not in _ADVICE:
        return ""
    main = _overall(inputs.verdict)
    compared = main.get("comparisons") or [{}]
    baseline = compared[0].get("best_baseline") or inputs.best_baseline()
    return _ADVICE[outcome].format(
        model=model_text(inputs.lead_model, inputs.lead_model).label,
        baseline=model_text(str(baseline)).label if baseline else "the best baseline",
    )


def _overall(verdict: dict[str, Any]) -> dict[str, Any]:
    """Return the decision over all held-out perturbations, empty where there is none."""
    details = verdict.get("details", [])
    return next((item for item in details if item.get("scope") == contracts.ALL_CATEGORIES), {})


def _brief(detail: dict[str, Any]) -> str:
    """Return the decision of one group in half a line, or its whole text where no comparison was made."""
    compared = detail.get("comparisons")
    if not compared:
        return str(detail["text"])
    first = compared[0]
    against = model_text(str(first["best_baseline"])).label
    text = (
        f"{detail['outcome']} the best baseline ({against}): {format_number(first['score'], 2)} against "
        f"{format_number(first['baseline_score'], 2)}, n = {format_count(detail.get('n'))}"
    )
    if first.get("gap_closed") is not None:
        text += f"; {format_percent(first['gap_closed'])} of the gap closed"
    return text


def _latent_share(inputs: ReportInputs) -> str:
    """Say in how many trainings the latent predictor adds to the linear branch; empty without a gate.

    Without this sentence a model whose gate is shut looks like a learned one that ties with the ridge.
    """
    runs = [
        record
        for name, record in inputs.train_metrics.items()
        if name.split(" ")[0] == inputs.main_model and record.get("linear_weights")
    ]
    if not runs:
        return ""
    open_gates = sum(record["latent_weight"] > 0 for record in runs)
    shut = len(runs) - open_gates
    text = f"Validation perturbations opened the gate of the latent predictor in {open_gates} of {len(runs)} "
    text += "training." if len(runs) == 1 else "trainings."
    if shut:
        text += (
            " Where it is shut, the predictions are those of the linear branch, half of which looks at the "
            "embedding."
        )
    return text


def checks_told(sentinels: list[dict[str, Any]]) -> dict[str, int]:
    """Count the leakage checks that passed, failed and could not be made, and what is stated alone."""
    stated = [item for item in sentinels if item.get("kind") == contracts.STATED and item["passed"]]
    checked = [item["passed"] for item in sentinels if item not in stated]
    return {
        "passed": sum(passed is True for passed in checked),
        "failed": sum(passed is False for passed in checked),
        "untold": sum(passed is None for passed in checked),
        "stated": len(stated),
    }


def facts(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Return the few counts that the head of the page states."""
    tested = inputs.metrics.loc[inputs.metrics["perturbation"] != contracts.WHOLE_MODEL, "perturbation"]
    seeds = inputs.metrics.loc[inputs.metrics["model"] == inputs.lead_model, "seed"]
    cells = inputs.qc["cells_after"].dropna()
    counts = [
        ("held-out perturbation", tested.nunique()),
        ("fold", len(inputs.splits) or inputs.metrics["fold"].nunique()),
        ("seed", max(seeds.nunique(), 1)),
        ("model or control", len(inputs.models)),
    ]
    found = [(name if count == 1 else _plural(name), format_count(count)) for name, count in counts]
    return [*found, ("cells after quality control", format_count(cells.iloc[-1] if len(cells) else None))]


def _plural(name: str) -> str:
    return "models and controls" if name == "model or control" else f"{name}s"
