"""Fit the simple models of a fold, and write one predictions file for each.

They see what BioJEPA sees: the training cells and the codes in ``pairs.h5``. Predictions are mean
log-expression: control + Δ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.baselines import fit_baselines
from biojepa.jobs import recorded_job
from biojepa.pairs import declare_use, read_pairs, trainable_labels, validation_labels
from biojepa.predictions import cells_per_label, predicted_rows, write_predictions
from biojepa.provenance import environment
from biojepa.responses import read_other_screens
from biojepa.splits import read_facts, read_split, require_same_split


def main(snakemake) -> None:
    """Fit all baselines in one job: each takes less time than starting Python."""
    pairs, split = read_pairs(snakemake.input.pairs), read_split(snakemake.input.split)
    require_same_split(pairs.facts, snakemake.input.split, snakemake.input.pairs)
    names, settings = snakemake.params.models, snakemake.params.settings
    rows = predicted_rows(split)
    n_cells = cells_per_label(snakemake.input.cells, read_facts(snakemake.input.split))
    _, control = pairs.pseudobulk()
    others = dict(zip(snakemake.params.responses, snakemake.input.responses, strict=True))
    screens = read_other_screens(snakemake.input.cells, others)
    fitted = fit_baselines(pairs, names, settings["neighbours"], settings["seed"], screens)
    used = declare_use(pairs, trainable_labels(pairs), validation_labels(pairs))
    for name, path in zip(names, snakemake.output.predictions, strict=True):
        prediction = fitted[name]
        write_predictions(
            path,
            name,
            split,
            rows,
            n_cells,
            pairs.genes,
            (control + prediction.delta[rows]).clip(min=0),  # a mean of log1p values cannot be negative
            provenance={**environment(), "model": name, **pairs.facts, **used, **prediction.facts},
            sd=None if prediction.sd is None else prediction.sd[rows],
        )


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
