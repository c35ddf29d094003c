"""Measure what the embedding of the model under test holds of cells that training never saw.

Question: is a trained encoder a better description of unseen cells than principal components, or than the
same encoder before training? Method: all are reduced to 50 principal components fitted on training cells;
on cells of test perturbations, collapse statistics, retrieval of cells of the same perturbation (Kalinin et
al., Nature Communications 2025) and linear probes of perturbation, batch and depth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import write_tsv
from biojepa.jobs import recorded_job
from biojepa.representation import measure_representation


def main(snakemake) -> None:
    """Measure and write the table of one model, fold and seed."""
    source, wildcards = snakemake.input, snakemake.wildcards
    run = {"model": wildcards.model, "fold": int(wildcards.fold), "seed": int(wildcards.seed)}
    table = measure_representation(source.model, source.cells, source.split, run, snakemake.params.device)
    write_tsv(table, snakemake.output.representation)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
