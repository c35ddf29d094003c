"""Train one model of one fold: the encoder on masked cells, then the predictor on populations.

An interrupted run is continued by the same command from ``checkpoint/``, with the same result.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.jobs import recorded_job
from biojepa.training.__main__ import train_in_processes, train_to_folder
from biojepa.training.settings import TrainSettings


def main(snakemake) -> str:
    """Train, write the model, its curves and its figures, and return the device."""
    pairs, folder = snakemake.input.pairs, Path(snakemake.output.model).parent
    seed, encoder = int(snakemake.wildcards.seed), snakemake.input.get("encoder") or None
    settings = TrainSettings.from_config(snakemake.params.settings)
    train = train_in_processes if settings.processes > 1 else train_to_folder
    train(pairs, folder, settings, seed, encoder)
    # Of several processes, none is this one.
    return str(json.loads(Path(snakemake.output.metrics).read_text(encoding="utf-8"))["device"])


if __name__ == "__main__":
    with recorded_job(snakemake) as record:
        record["device"] = main(snakemake)
