"""Predict perturbations outside the screen with the model that was trained on all of it.

Question: what would this gene, or this combination, do to these cells, and should one believe it?
Method: the model predicts mean log-expression from control cells and prior codes; perturbations are
ranked by the length of the change (log1p units, L2 over genes). Trust is what the same model reached on
held-out perturbations of the same kind in the scheme `perturbation`, over all its seeds; the expected
accuracy of each one is fitted on those, from its kind, nearest training gene and predicted effect.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

import torch

from biojepa.contracts import CATEGORY, PERTURBATION
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.trust import Expectation
from biojepa.files import read_tsv, sha256_of, write_tsv
from biojepa.jobs import recorded_job
from biojepa.pairs import read_pairs
from biojepa.prediction import held_out_accuracy, predict_perturbations
from biojepa.prediction_requests import read_requests, requests_from
from biojepa.predictions import write_requested
from biojepa.provenance import environment
from biojepa.splits import read_split
from biojepa.training import load_model
from biojepa.training.optimization import choose_device


def main(snakemake) -> None:
    """Read the model and what its like reached, predict, and write both files."""
    source, params = snakemake.input, snakemake.params
    settings = EvaluationSettings.from_mapping(params.settings)
    model = load_model(source.model, str(choose_device(params.device)))
    torch.set_num_threads(model.settings.torch_threads)
    splits = {fold: read_split(path) for fold, path in zip(params.folds, source.splits, strict=True)}
    held_out = held_out_accuracy(
        read_tsv(source.metrics), read_tsv(source.summary), params.model, settings, splits
    )
    predictions = predict_perturbations(
        model,
        read_pairs(source.pairs),
        read_requests(requests_from(params.predict, source.requests)),
        held_out,
        settings.min_perturbations,
        Expectation.of(read_tsv(source.trust, dtype={PERTURBATION: str, CATEGORY: str}), settings),
    )
    provenance = {
        **environment(),
        **model.facts,
        "model": params.model,
        "model_seed": params.seed,
        "requests": params.predict,
        "model_sha256": sha256_of(source.model),
    }
    write_requested(
        snakemake.output.predictions,
        predictions.table,
        predictions.genes,
        predictions.expression,
        predictions.sd,
        provenance,
    )
    write_tsv(predictions.table, snakemake.output.table)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
