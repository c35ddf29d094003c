"""Train one model of one fold: the encoder on masked cells, then the predictor on populations.

An interrupted run is continued by the same command from ``checkpoint/``, with the same result.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import write_json, write_tsv
from biojepa.logs import log_to
from biojepa.pairs import read_pairs
from biojepa.provenance import environment
from biojepa.training import TrainSettings, load_model, train_model
from biojepa.training.checkpoint import discard


def main(snakemake) -> None:
    """Train, and write the model, its curves and its figures."""
    reused = snakemake.input.get("encoder")
    settings = TrainSettings.from_config(snakemake.params.settings)
    checkpoint = Path(snakemake.output.model).parent / "checkpoint"
    model, history, metrics = train_model(
        read_pairs(snakemake.input.pairs),
        settings,
        int(snakemake.wildcards.seed),
        load_model(reused) if reused else None,
        checkpoint,
    )
    model.save(snakemake.output.model)
    write_tsv(history, snakemake.output.history)
    write_json({**environment(), **metrics}, snakemake.output.metrics)
    discard(checkpoint)


if __name__ == "__main__":
    with log_to(snakemake.log[0]):
        main(snakemake)
