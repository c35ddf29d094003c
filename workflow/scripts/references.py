"""Write what half of a perturbation's own cells predict: the technical duplicate, and its shrunken form.

They see test cells, as positive controls must; the truth they are judged by is the other half.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.evaluation.references import duplicates
from biojepa.jobs import recorded_job
from biojepa.pairs import read_pairs
from biojepa.predictions import cells_per_label, predicted_rows, write_predictions
from biojepa.provenance import environment
from biojepa.splits import read_facts, read_split, require_same_split


def main(snakemake) -> None:
    """Write one predictions file for each reference."""
    split, pairs = read_split(snakemake.input.split), read_pairs(snakemake.input.pairs)
    require_same_split(pairs.facts, snakemake.input.split, snakemake.input.pairs)
    rows, seed = predicted_rows(split), snakemake.params.half_seed
    facts = read_facts(snakemake.input.split)
    n_cells = cells_per_label(snakemake.input.cells, facts)
    for name, values in duplicates(snakemake.input.cells, split, rows, pairs.genes, seed, facts).items():
        provenance = {**environment(), "model": name, **pairs.facts, "half_seed": seed}
        write_predictions(snakemake.output[name], name, split, rows, n_cells, pairs.genes, values, provenance)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
