"""Write the tables of ``docs/results.md`` and ``docs/ablation.md`` from finished runs.

    python benchmarks/write_results.py RESULTS_FOLDER [RESULTS_FOLDER ...] > docs/results.md

Each folder is a ``results`` folder with ``{dataset}/{split}/evaluate/summary.tsv``. Scores are means over
held-out perturbations with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from ablation_table import ablation_lines, settings_of

METRICS = {
    "pearson_delta_perturbed_mean": "Pearson Δ",
    "rank_l2": "rank L2",
    "rank_cosine": "rank cosine",
    "weighted_r2_delta": "weighted R²",
    "spread_ratio": "spread ratio",
}
CATEGORIES = ("combo_seen2", "combo_seen1", "combo_seen0", "single_in_combo", "single")
DRAWS = 4000
DEFAULT = "config/examples/results.yaml"
HEAD = """# {title}

Made by `python benchmarks/write_results.py results{option} > docs/{name}.md` after this run, on two CPU cores
without a GPU. `FOLDER` holds the two published screens, the networks and the gene sets.

```sh
./run.sh --cores 2 --configfile {config} --config data_dir=FOLDER
```

All five folds, one seed. Means over held-out perturbations, 95 % bootstrap intervals over perturbations. The
paired differences are bootstrapped too. `duplicate`, `interpolated_duplicate` and the oracles see test cells,
as positive controls must. `no_change` is not at 0: weak perturbations look alike relative to the mean of all.
What the names mean: [config/README.md](../config/README.md#models).
"""


def cell(row: pd.Series) -> str:
    """Write a mean with its interval, or a dash where there is none."""
    if pd.isna(row["mean"]):
        return "–"
    if pd.isna(row["ci_low"]):
        return f"{row['mean']:.2f}"
    return f"{row['mean']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f})"


def by_model(summary: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of a table of models and metrics over all categories, best first."""
    everything = summary[summary["category"] == "all"]
    order = everything[everything["metric"] == "pearson_delta_perturbed_mean"].sort_values(
        "mean", ascending=False
    )
    yield f"| model | {' | '.join(METRICS.values())} |"
    yield "| --- |" + " ---: |" * len(METRICS)
    for model in order["model"]:
        rows = everything[everything["model"] == model].set_index("metric").reindex(list(METRICS))
        yield f"| `{model}` | " + " | ".join(cell(row) for _, row in rows.iterrows()) + " |"


def by_category(summary: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of a table of Pearson Δ by model and category."""
    scores = summary[summary["metric"] == "pearson_delta_perturbed_mean"]
    present = [name for name in CATEGORIES if name in set(scores["category"])]
    numbers = {name: int(scores.loc[scores["category"] == name, "n"].max()) for name in present}
    yield "| model | " + " | ".join(f"{name} (n = {numbers[name]})" for name in present) + " |"
    yield "| --- |" + " ---: |" * len(present)
    order = scores[scores["category"] == "all"].sort_values("mean", ascending=False)["model"]
    for model in order:
        rows = scores[scores["model"] == model].set_index("category").reindex(present)
        yield f"| `{model}` | " + " | ".join(cell(row) for _, row in rows.iterrows()) + " |"


def paired(metrics: pd.DataFrame, model: str, others: list[str]) -> Iterator[str]:
    """Yield the lines of a table of paired differences, bootstrapped over perturbations."""
    yield "| `" + model + "` minus | Pearson Δ | rank L2 | rank cosine |"
    yield "| --- | ---: | ---: | ---: |"
    rng = np.random.default_rng(0)
    for other in others:
        fields = []
        for metric in ("pearson_delta_perturbed_mean", "rank_l2", "rank_cosine"):
            scores = metrics[metrics["metric"] == metric]
            wide = scores.groupby(["perturbation", "model"])["value"].mean().unstack()
            gain = (wide[model] - wide[other]).dropna().to_numpy()
            draws = gain[rng.integers(len(gain), size=(DRAWS, len(gain)))].mean(axis=1)
            low, high = np.quantile(draws, [0.025, 0.975])
            fields.append(f"{gain.mean():+.3f} ({low:+.3f} to {high:+.3f})")
        yield f"| `{other}` | " + " | ".join(fields) + " |"


def section(folder: Path) -> Iterator[str]:
    """Yield the lines about one dataset and split; ``folder`` is that of ``evaluate``."""
    summary = pd.read_csv(folder / "summary.tsv", sep="\t")
    metrics = pd.read_csv(folder / "metrics.tsv", sep="\t")
    verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    dataset, split = folder.parts[-3], folder.parts[-2]
    splits = sorted((folder.parent).glob("fold*/pair/split.json"))
    yield f"## {dataset}, split by {split}, {len(splits)} folds"
    yield ""
    yield f"Verdict: {verdict['sentence']}"
    yield ""
    yield from by_model(summary)
    yield ""
    yield "By category, Pearson Δ:"
    yield ""
    yield from by_category(summary)
    yield ""
    others = ("mean", "no_change", "shuffled_priors", "ridge", "multihot", "mlp", "kernel_ridge", "pca")
    known = set(metrics["model"])
    yield from paired(metrics, verdict["model"], [name for name in others if name in known])
    yield ""
    if trust := (verdict.get("trust") or {}).get("sentence"):
        yield trust
        yield ""
    yield from representation(folder)
    yield from ablation_lines(metrics, settings_of(folder.parents[2], dataset))


def representation(folder: Path) -> Iterator[str]:
    """Yield how well embeddings retrieve cells of the same held-out perturbation, and what else they hold."""
    files = sorted(folder.parent.glob("fold*/*/seed*/embed/representation.tsv"))
    if not files:
        return
    table = pd.concat([pd.read_csv(path, sep="\t") for path in files])
    shown = {
        "knn_map_distinctiveness": "kNN-mAP",
        "probe_perturbation": "perturbation probe",
        "probe_batch": "batch probe",
        "probe_depth": "depth probe, R²",
    }
    means = table.groupby(["embedding", "metric"])[["value", "chance"]].mean()
    known = [name for name in shown if name in means.index.get_level_values("metric")]
    yield "Embeddings of held-out cells, means over folds and perturbations (in brackets, chance):"
    yield ""
    yield "| embedding | " + " | ".join(shown[name] for name in known) + " |"
    yield "| --- |" + " ---: |" * len(known)
    for embedding in dict.fromkeys(table["embedding"]):
        fields = []
        for name in known:
            value, chance = means.loc[(embedding, name)]
            fields.append(f"{value:.3f}" + ("" if pd.isna(chance) else f" ({chance:.3f})"))
        yield f"| {embedding} | " + " | ".join(fields) + " |"
    yield ""


def main() -> None:
    """Write all sections to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--config", default=DEFAULT, help="the config of the run")
    given = parser.parse_args()
    name = Path(given.config).stem
    option = "" if given.config == DEFAULT else f" --config {given.config}"
    lines = [HEAD.format(title=name.capitalize(), name=name, option=option, config=given.config)]
    for results in given.results:
        for folder in sorted(results.glob("*/*/evaluate")):
            lines += section(folder)
    sys.stdout.write("\n".join(lines))


if __name__ == "__main__":
    main()
