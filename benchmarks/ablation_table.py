"""Write the ablation of finished runs as Markdown: embeddings under the same head and the same priors.

    python benchmarks/ablation_table.py RESULTS_FOLDER [RESULTS_FOLDER ...]

Question: does the trained encoder add anything to principal components, or to its own random start?
Method: scores of ``evaluate/metrics.tsv``, means over held-out perturbations with bootstrap intervals,
and paired differences over the same perturbations. Level, number and seed of the draws are those of the run,
from its ``provenance.json``; defaults where that is missing. Units: those of the metric.
``write_results.py`` puts the same lines into ``docs/ablation.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from biojepa.evaluation.settings import EvaluationSettings  # noqa: E402
from biojepa.evaluation.verdict import DECIDING  # noqa: E402
from biojepa.report.ablation import (  # noqa: E402
    EMBEDDINGS,
    OTHERS,
    Estimate,
    ablation_sentence,
    compare_embeddings,
)
from biojepa.report.glossary import EMBEDDING_LABELS, metric_text  # noqa: E402


def settings_of(results: Path, dataset: str) -> EvaluationSettings:
    """Read the section ``evaluate`` that a run recorded for a dataset; defaults where it recorded none."""
    path = results / "provenance.json"
    if not path.is_file():
        return EvaluationSettings()
    recorded = json.loads(path.read_text(encoding="utf-8"))["config"]
    return EvaluationSettings.from_mapping(recorded.get(dataset, {}).get("evaluate"))


def ablation_lines(metrics: pd.DataFrame, settings: EvaluationSettings | None = None) -> Iterator[str]:
    """Yield one table per deciding metric and its sentence; nothing without a complete comparison.

    ``metrics`` has the columns of ``metrics.tsv``; ``settings`` are those of its evaluation.
    """
    for name in DECIDING:
        table = compare_embeddings(metrics, name, settings)
        if not table.complete:
            continue
        columns = [EMBEDDING_LABELS[embedding] for embedding in EMBEDDINGS]
        columns += [f"{columns[0]} − {EMBEDDING_LABELS[other]}" for other in OTHERS]
        yield f"Ablation, {metric_text(name).label}:"
        yield ""
        yield f"| head and priors | {' | '.join(columns)} |"
        yield "| --- |" + " ---: |" * len(columns)
        for row in table.rows:
            fields = [_field(row.scores.get(embedding), ".2f") for embedding in EMBEDDINGS]
            fields += [_field(row.gains.get(other), "+.3f") for other in OTHERS]
            yield f"| {row.label} | {' | '.join(fields)} |"
        yield ""
        yield ablation_sentence(table)
        yield ""


def _field(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return "–"
    if math.isnan(estimate.low):
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def main() -> None:
    """Write the tables of all datasets and splits to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    for results in parser.parse_args().results:
        for path in sorted(results.glob("*/*/evaluate/metrics.tsv")):
            settings = settings_of(results, path.parts[-4])
            lines = list(ablation_lines(pd.read_csv(path, sep="\t"), settings))
            if lines:
                print(f"## {path.parts[-4]}, split by {path.parts[-3]}", "", *lines, sep="\n")


if __name__ == "__main__":
    main()
