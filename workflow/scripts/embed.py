"""Embed every cell with the trained models, and predict the validation and test perturbations.

Test cells are embedded after training, with everything frozen. Predictions use control cells and codes
only; ``z_true`` holds the observed embeddings beside the predicted ones, pooled over tokens. The oracle
of an embedding is what its readout makes of the observed tokens of half A: the ceiling it sets.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.embedding import Outputs, embed_and_predict
from biojepa.jobs import recorded_job


def main(snakemake) -> None:
    """Read the cells once per model; all models of a fold share the start-up of one job."""
    output, params = snakemake.output, snakemake.params
    oracles = dict(zip(params.oracles, output.oracles, strict=True))
    for name, model, embeddings, predictions in zip(
        params.models, snakemake.input.models, output.embeddings, output.predictions, strict=True
    ):
        embed_and_predict(
            model,
            snakemake.input.cells,
            snakemake.input.split,
            Outputs(name, embeddings, predictions, params.oracles.get(name), oracles.get(name, "")),
            params.half_seed,
            params.device,
        )


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
