"""Train one model of one fold: the encoder on masked cells, then the predictor on populations.

An interrupted run is continued by the same command from ``checkpoint/``, with the same result.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.logs import log_to
from biojepa.training.__main__ import train_in_processes, train_to_folder
from biojepa.training.settings import TrainSettings


def main(snakemake) -> None:
    """Train, and write the model, its curves and its figures."""
    pairs, folder = snakemake.input.pairs, Path(snakemake.output.model).parent
    seed, encoder = int(snakemake.wildcards.seed), snakemake.input.get("encoder") or None
    settings = TrainSettings.from_config(snakemake.params.settings)
    train = train_in_processes if settings.processes > 1 else train_to_folder
    train(pairs, folder, settings, seed, encoder)


if __name__ == "__main__":
    with log_to(snakemake.log[0]):
        main(snakemake)
