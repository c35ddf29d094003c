"""Decide which perturbations of a fold are held out, and freeze it.

Perturbations, not cells, are dealt into folds; ``split.json`` carries the SHA-256 of the table.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.jobs import listed, recorded_job
from biojepa.pairing import PairSettings, freeze_split

if __name__ == "__main__":
    with recorded_job(snakemake):
        wildcards, settings = snakemake.wildcards, dict(snakemake.params.settings)
        if named := listed(snakemake.input.get("listed", [])):
            # Where the rule's input has it, in a module with a prefix elsewhere than the config says.
            settings["list"] = named[0]
        freeze_split(
            snakemake.input.cells,
            snakemake.output.split,
            wildcards.dataset,
            wildcards.split,
            int(wildcards.fold),
            PairSettings(**settings),
        )
