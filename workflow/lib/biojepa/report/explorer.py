"""Data behind the explorer of single perturbations, bounded so that the page stays small."""

from __future__ import annotations

from typing import Any

import pandas as pd

from biojepa.report.figures import comparison_models, main_models, number, numbers
from biojepa.report.glossary import category_label, metric_text, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import ordered_models, per_perturbation_scores

MAX_SCORES = 200_000
MAX_SETS = 14


def explorer_data(inputs: ReportInputs) -> dict[str, Any]:
    """Collect scores, profiles and gene sets by perturbation as plain JSON content.

    All models are kept while models × metrics × perturbations stays below ``MAX_SCORES``, and the
    main models beyond that, so that a screen of thousands of perturbations still opens quickly.
    """
    scores = per_perturbation_scores(inputs)
    names = sorted(scores["perturbation"].unique())
    metrics = [name for name in dict.fromkeys(scores["metric"]) if _offered(name)]
    metrics = [name for name in inputs.headline_metrics if name in metrics] + sorted(
        name for name in metrics if name not in inputs.headline_metrics
    )
    models = [model.name for model in ordered_models(inputs)]
    reduced = len(names) * len(metrics) * len(models) > MAX_SCORES
    if reduced:
        metrics = [name for name in metrics if name in inputs.headline_metrics]
        models = comparison_models(inputs)
        models = models if len(names) * len(metrics) * len(models) <= MAX_SCORES else main_models(inputs)
    category = scores.drop_duplicates("perturbation").set_index("perturbation")["category"]
    described = inputs.perturbations.drop_duplicates("perturbation").set_index("perturbation")
    genes: dict[str, int] = {}
    sets: dict[str, int] = {}
    return {
        "names": names,
        "categories": [str(category[name]) for name in names],
        "categoryLabels": {key: category_label(key) for key in sorted(set(map(str, category)))},
        "strata": {
            "significant genes": _described(described, "n_deg", names),
            "cells": _described(described, "n_cells", names),
            "effect size": _described(described, "effect_size", names),
        },
        "metrics": [_metric(name) for name in metrics],
        "models": [_model(name, inputs) for name in models],
        "scores": _score_matrix(scores, metrics, models, names, 3 if reduced else 4),
        "reduced": reduced,
        "lead": inputs.lead_model,
        "baseline": {name: inputs.best_baseline(name) for name in metrics},
        "profiles": {name: _profile(profile, genes) for name, profile in sorted(inputs.profiles.items())},
        "genes": list(genes),
        "nes": _gene_sets(inputs, set(names), sets),
        "sets": list(sets),
    }


def _offered(metric: str) -> bool:
    return metric_text(metric).role != "representation"


def _metric(name: str) -> dict[str, Any]:
    text = metric_text(name)
    return {
        "name": name,
        "label": f"{text.label} {text.arrow}",
        "best": text.best,
        "read": text.read,
        "legacy": text.role == "legacy",
    }


def _model(name: str, inputs: ReportInputs) -> dict[str, str]:
    text = model_text(name, inputs.lead_model)
    return {"name": name, "label": text.label, "group": text.group}


def _described(table: pd.DataFrame, column: str, names: list[str]) -> list[float | None]:
    values = pd.to_numeric(table[column], errors="coerce").reindex(names)
    return numbers(values, 6)


def _score_matrix(
    scores: pd.DataFrame, metrics: list[str], models: list[str], names: list[str], digits: int
) -> dict[str, dict[str, list[float | None]]]:
    """Return ``{metric: {model: values in the order of names}}``."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for metric in metrics:
        of_metric = scores[scores["metric"] == metric]
        wide = of_metric.pivot(index="perturbation", columns="model", values="value").reindex(names)
        columns = [model for model in models if model in wide and wide[model].notna().any()]
        found[metric] = {model: numbers(wide[model], digits) for model in columns}
    return found


def _profile(profile: Any, genes: dict[str, int]) -> dict[str, Any]:
    """Return a profile whose genes are positions in the shared list, which is extended."""
    return {
        "fold": profile.fold,
        "g": [genes.setdefault(gene, len(genes)) for gene in profile.genes],
        "o": numbers(profile.observed, 3),
        "p": {model: numbers(values, 3) for model, values in profile.predicted.items()},
    }


def _gene_sets(inputs: ReportInputs, names: set[str], sets: dict[str, int]) -> dict[str, list[list[Any]]]:
    """Return, by perturbation, its sets with the strongest observed enrichment and what models said."""
    table = inputs.enrichment[inputs.enrichment["perturbation"].isin(names)].dropna(subset=["nes_true"])
    if table.empty:
        return {}
    keys = ["perturbation", "gene_set"]
    truth = table.groupby(keys, sort=True)[["nes_true", "fdr_true"]].mean()
    said = table.groupby([*keys, "model"], sort=True)["nes_pred"].mean().unstack("model")
    found: dict[str, list[list[Any]]] = {}
    for name, rows in truth.groupby(level=0, sort=True):
        order = rows["nes_true"].abs().sort_values(ascending=False, kind="stable").index[:MAX_SETS]
        found[str(name)] = [
            [
                sets.setdefault(str(key[1]), len(sets)),
                number(rows.loc[key, "nes_true"], 3),
                number(rows.loc[key, "fdr_true"], 3),
                {
                    str(model): number(value, 3)
                    for model, value in said.loc[key].items()
                    if not pd.isna(value)
                },
            ]
            for key in order
        ]
    return found
