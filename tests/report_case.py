"""Inputs of a report made by hand: 30 perturbations, 14 models, two folds, names that look like markup."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biojepa import contracts
from biojepa.evaluation.metrics import all_metrics
from biojepa.report import Profile, ReportInputs
from biojepa.report.glossary import metric_text

HOSTILE = "<b>x</b>"
NASTY = (HOSTILE, '"><script>alert(1)</script>', "it's & so; on", "GÈNE→Ω", "50% #1")
HOSTILE_GENE = "</script>"
QUALITY = {
    "duplicate": 0.82, "interpolated_duplicate": 0.84, "oracle": 0.78, "biojepa": 0.63,
    "untrained_predictor": 0.41, "pca_predictor": 0.52,
    "multihot": 0.58, "additive": 0.35, "linear": 0.31, "knn": 0.22, "no_change": 0.17,
    "mean": 0.0, "shuffled_labels": 0.02, "my_model": 0.28,
}  # fmt: skip
WHOLE_MODEL_METRICS = ("effect_slope", "spread_ratio")
CATEGORIES = ("combo_seen2", "combo_seen1", "combo_seen0", "single_in_combo", "single")


def _score(metric: str, quality: np.ndarray | float) -> np.ndarray | float:
    """Turn a quality between 0 and 1 into a plausible value of a metric."""
    return {
        "rank_l2": 0.5 + 0.5 * quality,
        "rank_cosine": 0.5 + 0.45 * quality,
        "additive_l2_difference": 1.2 - 2 * quality,
        "l2_top1000": 5 - 3 * quality,
        "mse": 0.05 - 0.03 * quality,
        "pearson_delta_control": 0.6 + 0.3 * quality,
        "crps": 0.2 - 0.1 * quality,
    }.get(metric, quality)


def make_metrics(rng: np.random.Generator, names: list[str], categories: list[str]) -> pd.DataFrame:
    """Return a metrics table of all models and registered metrics, two folds."""
    hardness = rng.normal(0, 0.14, len(names)) - 0.12 * np.array([c == "single" for c in categories])
    rows = []
    for model, quality in QUALITY.items():
        for metric in all_metrics():
            if metric in WHOLE_MODEL_METRICS:
                rows += [(model, fold, 0, "*", "all", metric, quality) for fold in (0, 1)]
                continue
            noise = 0.0 if model == "mean" and "delta" in metric else 1.0
            values = _score(
                metric, np.clip(quality + noise * (hardness + rng.normal(0, 0.07, len(names))), -1, 1)
            )
            rows += [
                (model, i % 2, 0, name, category, metric, value)
                for i, (name, category, value) in enumerate(zip(names, categories, values, strict=True))
            ]
    return pd.DataFrame(rows, columns=list(contracts.METRICS_COLUMNS))


def make_summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """Pool the metrics with a normal interval: close enough to a bootstrap for a picture."""
    rows = []
    categories = ["all", *sorted(set(metrics["category"]) - {"all"})]
    for category in categories:
        inside = metrics if category == "all" else metrics[metrics["category"] == category]
        for metric, block in inside.groupby("metric", sort=False):
            by_model = block.groupby("model", sort=False)["value"]
            mean, n = by_model.mean(), by_model.size()
            half = 1.96 * by_model.std().fillna(0) / np.sqrt(n)
            simple = [
                name
                for name in ("multihot", "additive", "linear", "knn", "no_change", "mean")
                if name in mean
            ]
            best = min(simple, key=lambda name: metric_text(metric).loss(mean[name]))
            gap = (mean - mean["mean"]) / (mean["duplicate"] - mean["mean"])
            for model in mean.index:
                p = np.nan if model == best else 0.001 if abs(mean[model] - mean[best]) > 0.04 else 0.4
                rows.append(
                    (model, category, metric, n[model], mean[model], mean[model] - half[model],
                     mean[model] + half[model], gap[model], gap[model] - 0.1, gap[model] + 0.1, best,
                     p, np.nan if model in contracts.POSITIVE_CONTROLS else p, 0.7, 0.3)
                )  # fmt: skip
    return pd.DataFrame(rows, columns=list(contracts.SUMMARY_COLUMNS))


def make_enrichment(rng: np.random.Generator, names: list[str], categories: list[str]) -> pd.DataFrame:
    """Return enrichment scores of twelve gene sets for three models."""
    rows = []
    for name, category in zip(names, categories, strict=True):
        truth = rng.choice([-1, 1], 12) * rng.uniform(0.8, 2.6, 12)
        for model in ("biojepa", "multihot", "duplicate", "mean"):
            said = QUALITY[model] * truth + rng.normal(0, 0.5, 12)
            rows += [
                (model, 0, 0, name, category, f"SET_{k} interferon & response <{k}>", said[k], truth[k],
                 0.01 if abs(truth[k]) > 1.7 else 0.4)
                for k in range(12)
            ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(contracts.ENRICHMENT_COLUMNS))


def make_perturbations(rng: np.random.Generator, names: list[str]) -> pd.DataFrame:
    """Return the table of perturbations, with combinations whose targets are joined by a semicolon."""
    n = len(names)
    double = ["+" in name for name in names]
    return pd.DataFrame(
        {
            "perturbation": names,
            "n_perturbed_genes": [2 if d else 1 for d in double],
            "n_cells": rng.integers(28, 220, n),
            "n_guides": 3,
            "guides": "g1;g2;g3",
            "target_measured": ["yes;no" if d else "yes" for d in double],
            "on_target_log2fc": [
                f"{rng.normal(-1.5, 0.7):.3f}" + (f";{rng.normal(-1, 0.5):.3f}" if d else "") for d in double
            ],
            "on_target_p": ["1e-6;0.02" if d else "1e-9" for d in double],
            "effect_size": rng.gamma(2, 0.4, n),
            "effect_p": 0.01,
            "effect_q": np.where(rng.uniform(size=n) < 0.7, 0.01, 0.4),
            "n_deg": rng.integers(0, 160, n),
            "top_gene": "AVP",
            "top_gene_share": 0.91,
            "responding_share": np.nan,
            "flag": ["weak;one_guide" if k % 5 == 0 else None for k in range(n)],
        }
    )[list(contracts.PERTURBATION_TABLE_COLUMNS)]


def make_umap(rng: np.random.Generator, names: list[str], n: int = 2400) -> pd.DataFrame:
    """Return a map in which perturbations are overlapping clouds."""
    labels = rng.choice([contracts.CONTROL, *names], n)
    centre = {name: rng.normal(0, 2.2, 2) for name in [contracts.CONTROL, *names]}
    points = np.array([centre[label] for label in labels]) + rng.normal(0, 0.9, (n, 2))
    sets = {
        name: ("test" if k % 4 == 0 else "val" if k % 7 == 0 else "train") for k, name in enumerate(names)
    }
    return pd.DataFrame(
        {
            "cell": [f"cell{k}" for k in range(n)],
            "umap_1": points[:, 0],
            "umap_2": points[:, 1],
            "perturbation": labels,
            "set": [sets.get(label, "train") for label in labels],
            "batch": rng.choice(["b1", "b2", "b3"], n),
        }
    )


def make_history(rng: np.random.Generator) -> pd.DataFrame:
    """Return curves of two stages; the predictor has no collapse statistics."""
    step = np.arange(20, 620, 20)
    encoder = pd.DataFrame({
        "stage": "encoder", "step": step, "loss": 30 * np.exp(-step / 200) + rng.normal(0, 0.4, len(step)),
        "std_cells": 0.9 - 0.4 * np.exp(-step / 150), "rankme": 60 * (1 - np.exp(-step / 180)),
        "lidar": 12 * (1 - np.exp(-step / 250)), "val_loss": np.nan,
    })  # fmt: skip
    loss = 1.2 * np.exp(-step / 150) + 0.3
    predictor = pd.DataFrame({"stage": "predictor", "step": step, "loss": loss, "val_loss": loss + 0.1})
    return pd.concat([encoder, predictor], ignore_index=True)


def make_profiles(rng: np.random.Generator, names: list[str]) -> dict[str, Profile]:
    """Return predicted and observed changes over sixty genes, one of them with a hostile name."""
    genes = [HOSTILE_GENE, *[f"GENE{k}" for k in range(59)]]
    found = {}
    for k, name in enumerate(names):
        observed = np.sort(rng.laplace(0, 0.4, 60))[::-1]
        predicted = {
            model: (QUALITY[model] * observed + rng.normal(0, 0.12, 60)).tolist()
            for model in ("biojepa", "multihot", "duplicate")
        }
        found[name] = Profile(k % 2, genes, observed.tolist(), predicted)
    return found


def make_inputs(seed: int = 0) -> ReportInputs:
    """Return the inputs of a report on 30 perturbations, 14 models and two folds."""
    rng = np.random.default_rng(seed)
    singles = [*NASTY, *[f"GENE{k}" for k in range(13)]]
    names = singles + [f"GENE{k}+GENE{k + 3}" for k in range(12)]
    categories = ["single" if k % 3 else "single_in_combo" for k in range(18)]
    categories += [CATEGORIES[k % 3] for k in range(12)]
    metrics = make_metrics(rng, names, categories)
    summary = make_summary(metrics)
    norms = pd.DataFrame(
        [(model, name, o, QUALITY[model] * o + rng.normal(0, 0.1)) for name, o in
         zip(names, rng.gamma(4, 0.6, len(names)), strict=True) for model in QUALITY],
        columns=["model", "perturbation", "observed", "predicted"],
    )  # fmt: skip
    usable = {name: name not in ("weighted_r2_delta", "mse") for name in all_metrics()}
    history = make_history(rng)
    return ReportInputs(
        dataset="demo <screen>",
        split="perturbation",
        metrics=metrics,
        summary=summary,
        enrichment=make_enrichment(rng, names, categories),
        verdict={
            "model": "biojepa",
            "outcome": "better than",
            "sentence": "On 30 held-out perturbations, biojepa is better than the best simple baseline "
            "(multihot): correlation of the change against the training perturbed mean 0.60 against 0.55, "
            "difference +0.05 (95% CI +0.01 to +0.09).",
            "details": [
                {"scope": "seen genes", "text": "On 18 of seen genes, biojepa is better …"},
                {"scope": "unseen genes", "text": "On 12 of unseen genes, this dataset cannot tell."},
            ],
            "usable": usable,
            "dynamic_range": {name: {"low": 0.6, "high": 0.9, "mean": 0.75} for name in usable},
            "rule": "interval of the paired difference",
        },
        splits=[
            {"fold": f, "scheme": "perturbation", "seed": 0, "sha256": f"{f}" * 64, "n_train": 18, "n_val": 4,
             "n_test": 15}
            for f in (0, 1)
        ],
        qc=pd.DataFrame(
            [("no_guide", "dominance, ≥ 5 UMIs", 10_000, 512, 9_488, ""),
             ("min_counts", "≥ 500 UMIs", 9_488, 40, 9_448, ""),
             ("max_pct_mito", "5 MADs", 9_448, 420, 9_028, "per batch"),
             ("doublets", "off", 9_028, 0, 9_028, "not run"),
             ("min_cells", "≥ 25 cells", 9_028, 128, 8_900, "2 perturbations: A, <i>B</i>")],
            columns=list(contracts.QC_COLUMNS),
        ),
        perturbations=make_perturbations(rng, names),
        umap=make_umap(rng, names),
        coverage=pd.DataFrame(
            [("A", 2, 1, 1, "coded"), (HOSTILE_GENE, 0, 0, 0, "average"), ("B", 1, 1, 0, "coded")] * 2
            + [("C", 1, 1, 0, "coded"), ("C", 0, 0, 0, "average")],
            columns=["gene", "n_sources", "string", "go", "consequence"],
        ),
        histories={f"biojepa fold{f} seed0": history.assign(loss=history["loss"] + f) for f in (0, 1)},
        train_metrics={
            f"biojepa fold{f} seed0": {"device": "cpu", "seconds": 41.2, "embedding": {"rankme": 55.1}}
            for f in (0, 1)
        },
        profiles=make_profiles(rng, names),
        norms=norms,
        provenance={"commit": "0123abc", "versions": {"torch": "2.13.0"}, "hardware": "2 CPU cores"},
        settings={"model": {"depth": 2}, "seed": 0},
        sentinels=[{"check": "split.tsv is the one that was frozen", "passed": True, "detail": "ok"},
                   {"check": "every prediction declares its set", "passed": False, "detail": "1 of 12"}],
        downloads=[{"label": "evaluate/metrics.tsv", "href": "evaluate/metrics.tsv"}],
    )  # fmt: skip
