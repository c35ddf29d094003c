"""Embed every cell with a trained model, and predict the validation and test perturbations.

Test cells are embedded after training, with everything frozen. The predictions use control cells and
codes only; ``z_true`` holds the observed embeddings beside the predicted ones, pooled over tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.embedding import embed_and_predict
from biojepa.logs import log_to

if __name__ == "__main__":
    with log_to(snakemake.log[0]):
        embed_and_predict(
            snakemake.input.model,
            snakemake.input.cells,
            snakemake.input.split,
            snakemake.output.embeddings,
            snakemake.output.predictions,
            snakemake.wildcards.model,
            snakemake.params.device,
        )
