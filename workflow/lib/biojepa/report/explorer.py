"""Data behind the explorer of single perturbations, bounded so that the page stays small."""

from __future__ import annotations

from typing import Any

import pandas as pd

from biojepa.labels import perturbation_of
from biojepa.report.figures import comparison_models, main_models, numbers
from biojepa.report.glossary import category_label, metric_text, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import ordered_models, per_perturbation_scores

MAX_SCORES = 200_000
MAX_SETS, MIN_SETS = 14, 5
# Enrichment scores of all perturbations together, and the models that are shown beside the observed ones.
MAX_SET_SCORES, MAX_SET_MODELS = 60_000, 6


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
    # Described over all of its cells, whatever context they are in.
    measured = [perturbation_of(name) for name in names]
    genes: dict[str, int] = {}
    sets: dict[str, int] = {}
    return {
        "names": names,
        "categories": [str(category[name]) for name in names],
        "categoryLabels": {key: category_label(key) for key in sorted(set(map(str, category)))},
        "strata": {
            "significant genes": _described(described, "n_deg", measured),
            "cells": _described(described, "n_cells", measured),
            "effect size": _described(described, "effect_size", measured),
        },
        "metrics": [_metric(name) for name in metrics],
        "models": [_model(name, inputs) for name in models],
        "scores": _score_matrix(scores, metrics, models, names, 3 if reduced else 4),
        "reduced": reduced,
        "lead": inputs.lead_model,
        "baseline": {name: inputs.best_baseline(name) for name in metrics},
        "profiles": {name: _profile(profile, genes) for name, profile in sorted(inputs.profiles.items())},
        "genes": list(genes),
        **_gene_sets(inputs, set(names), sets),
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


def _gene_sets(inputs: ReportInputs, names: set[str], sets: dict[str, int]) -> dict[str, Any]:
    """Return what models said of the gene sets with the strongest observed enrichment.

    Returns
    -------
    dict
        ``nesModels``, and in ``nes``, by perturbation, rows of set (a position in ``sets``, which is
        extended), observed NES, its FDR, and the NES of every model. Of more perturbations than
        ``MAX_SET_SCORES`` allows, those with the strongest enrichment are kept.
    """
    table = inputs.enrichment[inputs.enrichment["perturbation"].isin(names)].dropna(subset=["nes_true"])
    if table.empty:
        return {"nesModels": [], "nes": {}}
    keys = ["perturbation", "gene_set"]
    truth = table.groupby(keys, sort=True)[["nes_true", "fdr_true"]].mean()
    said = table.groupby([*keys, "model"], sort=True)["nes_pred"].mean().unstack("model").loc[truth.index]
    scored = [model.name for model in ordered_models(inputs) if model.name in said.columns]
    first = main_models(inputs)
    models = sorted(scored, key=lambda name: name not in first)[:MAX_SET_MODELS]
    strength = truth["nes_true"].abs()
    order = strength.sort_values(ascending=False, kind="stable").index
    strongest = list(dict.fromkeys(order.get_level_values(0)))
    columns = len(models) + 3
    kept = set(strongest[: MAX_SET_SCORES // (MIN_SETS * columns)])
    limit = max(MIN_SETS, min(MAX_SETS, MAX_SET_SCORES // (len(kept) * columns)))
    values = dict(zip(truth.index, truth.to_numpy(), strict=True))
    predicted = dict(zip(truth.index, said[models].to_numpy(), strict=True))
    found: dict[str, list[list[Any]]] = {name: [] for name in sorted(kept)}
    for key in order:
        name, gene_set = key
        if name in kept and len(found[name]) < limit:
            position = sets.setdefault(str(gene_set), len(sets))
            found[name].append([position, *numbers(values[key], 3), numbers(predicted[key], 3)])
    return {"nesModels": models, "nes": found}
