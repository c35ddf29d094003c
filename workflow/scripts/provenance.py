"""Record how all results were made: commit, versions, resolved config, checksums, run times."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import write_json
from biojepa.logs import log_to
from biojepa.provenance import record_of_run

if __name__ == "__main__":
    with log_to(snakemake.log[0]):
        # Of a module with a prefix, logs lie beside results below it.
        benchmarks = Path(snakemake.output[0]).parent.parent / "logs" / "benchmarks"
        files = [*snakemake.input.splits, *snakemake.input.metrics, *snakemake.input.reports]
        write_json(
            record_of_run(snakemake.params.config, files, benchmarks, Path(__file__).parent),
            snakemake.output[0],
        )
