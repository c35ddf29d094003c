"""Score the predictions of every model on the held-out perturbations of a split.

Question: how much of the distance from a trivial guess to a technical replicate does each model
cover, and is it more than the best simple model covers with the same information?

Method: the truth of a perturbation is the mean over half B of its cells; the unit is the perturbation;
folds are pooled; intervals come from a bootstrap over perturbations; models are compared with the best
simple baseline by paired tests. Metrics and their formulas: ``biojepa.evaluation.metrics``.

Units: log1p of counts per ``target_sum`` of the library. Every score is unitless but the L2 distances
and the mean squared error, which are in log units (squared).
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.evaluation.evaluate import EvaluationResult, evaluate
from biojepa.evaluation.predictions import PredictionFile
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.splits import read_split
from biojepa.files import atomic_path, write_json, write_tsv
from biojepa.jobs import recorded_job


def run(
    cells: str,
    splits: Sequence[tuple[str, str, int]],
    predictions: Sequence[tuple[Mapping[str, Any], str]],
    settings: Mapping[str, Any],
    gene_sets: str | None = None,
    pairs: Sequence[str] | None = None,
) -> EvaluationResult:
    """Read the splits, name the prediction files and score them.

    Parameters
    ----------
    cells
        ``cells.h5ad``.
    splits
        ``split.tsv``, ``split.json`` and number of each fold.
    predictions
        ``{model, fold, seed}`` and ``predictions.h5ad`` of each file.
    settings
        Config section ``evaluate``.
    gene_sets
        GMT file, or None.
    pairs
        ``pairs.h5`` of each fold, to check what training read, or None.
    """
    folds = [read_split(table, info, fold) for table, info, fold in splits]
    files = [
        PredictionFile(str(entry["model"]), int(entry["fold"]), int(entry["seed"]), Path(path))
        for entry, path in predictions
    ]
    return evaluate(cells, folds, files, EvaluationSettings.from_mapping(settings), gene_sets, pairs)


def write(result: EvaluationResult, output: Any) -> None:
    """Write the tables, the verdict and the observed means to the rule's outputs."""
    write_tsv(result.metrics, output.metrics)
    write_tsv(result.summary, output.summary)
    write_tsv(result.enrichment, output.enrichment)
    write_tsv(result.strata, output.strata)
    write_tsv(result.trust, output.trust)
    write_json(result.verdict, output.verdict)
    with atomic_path(output.truth) as temporary:
        result.observed.write_h5ad(temporary, compression="gzip")


if __name__ == "__main__":
    with recorded_job(snakemake):
        result = run(
            cells=snakemake.input.cells,
            splits=list(
                zip(snakemake.input.splits, snakemake.input.split_infos, snakemake.params.folds, strict=True)
            ),
            predictions=list(zip(snakemake.params.predictions, snakemake.input.predictions, strict=True)),
            settings=snakemake.params.settings,
            pairs=list(snakemake.input.get("pairs", [])) or None,
            gene_sets=next(iter(snakemake.input.get("gene_sets", [])), None),
        )
        write(result, snakemake.output)
