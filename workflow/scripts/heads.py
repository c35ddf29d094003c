"""Fit ridge and nearest neighbours on the frozen embeddings of a fold, and write their predictions.

They see what the trained models see: the training cells and the codes in ``pairs.h5``. Embedding and
readout are those of the trained models. Predictions are mean log-expression; ``z_pred`` is the predicted
embedding, pooled over tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

import torch

from biojepa.heads import fit_heads
from biojepa.jobs import recorded_job
from biojepa.models import HEAD_MODELS
from biojepa.pairs import declare_use, read_pairs, trainable_labels
from biojepa.predictions import cells_per_label, predicted_rows, write_predictions
from biojepa.provenance import environment
from biojepa.splits import read_facts, read_split, require_same_split
from biojepa.training import load_model
from biojepa.training.optimization import choose_device


def main(snakemake) -> None:
    """Fit all heads in one job: each takes less time than starting Python."""
    source, params = snakemake.input, snakemake.params
    # Sums depend on the number of threads in the last digit.
    torch.set_num_threads(params.torch_threads)
    pairs, split = read_pairs(source.pairs), read_split(source.split)
    require_same_split(pairs.facts, source.split, source.pairs)
    device = str(choose_device(params.device))
    models = {
        name: load_model(path, device) for name, path in zip(params.sources, source.models, strict=True)
    }
    for name, path in zip(params.sources, source.models, strict=True):
        require_same_split(models[name].facts, source.split, path)
    seed = int(snakemake.wildcards.seed)
    fitted = fit_heads(models, pairs, params.models, params.neighbours, seed)
    rows = predicted_rows(split)
    n_cells = cells_per_label(source.cells, read_facts(source.split))
    for name, path in zip(params.models, snakemake.output.predictions, strict=True):
        prediction = fitted[name]
        write_predictions(
            path,
            name,
            split,
            rows,
            n_cells,
            pairs.genes,
            prediction.expression[rows],
            provenance={
                **environment(),
                **pairs.facts,
                **declare_use(pairs, trainable_labels(pairs), [], models[HEAD_MODELS[name].source].facts),
                "model": name,
                "embedding_of": HEAD_MODELS[name].source,
            },
            z_pred=prediction.tokens[rows].mean(axis=1),
        )


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
