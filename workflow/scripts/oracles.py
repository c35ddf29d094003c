"""Write what the readout makes of observed embeddings: the ceiling that an embedding sets.

An embedding that lost a perturbation cannot predict it, however good the predictor. Half A of the cells
is encoded; the truth is half B.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.embedding import predict_by_oracle
from biojepa.logs import log_to

if __name__ == "__main__":
    with log_to(snakemake.log[0]):
        jobs = zip(snakemake.input.models, snakemake.params.oracles, snakemake.output, strict=True)
        for model, oracle, predictions in jobs:
            predict_by_oracle(
                model,
                snakemake.input.cells,
                snakemake.input.split,
                predictions,
                oracle,
                snakemake.params.half_seed,
                snakemake.params.device,
            )
