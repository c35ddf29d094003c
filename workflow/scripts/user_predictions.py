"""Check predictions that were made elsewhere, and write them as the predictions of any model.

Question: are these the genes, the perturbations and the scale of this fold, and were they made for its
split? What a model made elsewhere was trained on cannot be checked here; a file that says that it was
fitted on another split is refused.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.evaluation.user_predictions import Wanted, read_user_predictions
from biojepa.files import sha256_of
from biojepa.jobs import recorded_job
from biojepa.pairs import read_pairs
from biojepa.predictions import cells_per_label, write_predictions
from biojepa.provenance import environment
from biojepa.splits import read_facts, read_split, require_same_split


def main(snakemake) -> None:
    """Read the user's file and write the rows of the validation and test perturbations."""
    source, params, name = snakemake.input, snakemake.params, snakemake.wildcards.model
    split, pairs = read_split(source.split), read_pairs(source.pairs)
    require_same_split(pairs.facts, source.split, source.pairs)
    _, control = pairs.pseudobulk()
    wanted = Wanted(split, pairs.genes, control, params.target_sum, str(pairs.facts["split_sha256"]))
    kept = params.distribution
    read = read_user_predictions(source.predictions, wanted, kept["max_cells"], kept["seed"])
    write_predictions(
        snakemake.output.predictions,
        name,
        split,
        read.rows,
        cells_per_label(source.cells, read_facts(source.split)),
        pairs.genes,
        read.mean,
        provenance={
            **environment(),
            "model": name,
            "made_elsewhere": True,
            "sha256": sha256_of(source.predictions),
            **pairs.facts,
            **read.declared,
        },
        sd=read.sd,
        cells=None if read.cells is None or read.owner is None else (read.cells, read.owner),
    )


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
