"""Simulate a CRISPR screen whose truth is known.

Question: would the pipeline find effects that are known? Method: draws a gene network, response
programmes over it, guides and cells, then negative binomial UMI counts with the depth, gene means,
dispersions and guide UMIs fitted on a real screen (``resources/simulator.json``). Units: UMIs; true
effects in natural-log fold change. The truth files are for tests and are read by no other stage.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.jobs import recorded_job
from biojepa.simulate import (
    PARAMETERS_FILE,
    ScreenFiles,
    ScreenParameters,
    SimulatorSettings,
    simulate_screen,
)


def main(snakemake) -> None:
    output = snakemake.output
    files = ScreenFiles(
        raw=Path(output.raw),
        guides=Path(output.guides),
        network=Path(output.network),
        gene_sets=Path(output.gene_sets),
        truth=Path(output.truth),
        truth_cells=Path(output.truth_cells),
    )
    settings = SimulatorSettings.from_dict(snakemake.params.settings)
    parameters = ScreenParameters.read(snakemake.input.get("parameters", PARAMETERS_FILE))
    simulate_screen(settings, files, parameters=parameters)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
