"""Collect what training may see of a fold: no cell of a test perturbation.

Genes are chosen on training cells; every cell is paired with a control; the codes of all perturbed
genes, the held-out ones too, come from side information alone (and, with co-expression, from training
cells). Beside the pairs lie a table of which source covers which gene, one of how many cells of each
perturbation train, and one of how much cells and their controls are alike.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.balance import pairing_balance
from biojepa.files import sha256_of, write_tsv
from biojepa.jobs import recorded_job
from biojepa.pairing import PairSettings, build_pairs
from biojepa.prediction_requests import read_requests, requests_from

if __name__ == "__main__":
    with recorded_job(snakemake):
        wildcards = snakemake.wildcards
        facts = {
            "dataset": wildcards.dataset,
            "scheme": wildcards.split,
            "fold": int(wildcards.fold),
            "seed": snakemake.params.settings["seed"],
            "split_sha256": sha256_of(snakemake.input.split),
        }
        others = dict(zip(snakemake.params.responses, snakemake.input.get("responses", []), strict=True))
        tables = build_pairs(
            snakemake.input.cells,
            snakemake.input.split,
            snakemake.output.pairs,
            snakemake.input.get("networks", []),
            snakemake.input.get("gene_sets", []),
            PairSettings(**snakemake.params.settings),
            facts,
            gene_tables=snakemake.input.get("gene_tables", []),
            responses=others,
            requests=read_requests(
                requests_from(snakemake.params.predict, snakemake.input.get("requests", []))
            ),
        )
        write_tsv(tables.coverage, snakemake.output.coverage)
        write_tsv(tables.training_cells, snakemake.output.training_cells)
        write_tsv(pairing_balance(snakemake.input.cells, snakemake.output.pairs), snakemake.output.balance)
