"""Record how all results were made: commit, versions, resolved config, checksums, jobs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import write_json
from biojepa.logs import log_to
from biojepa.provenance import record_of_run

if __name__ == "__main__":
    with log_to(snakemake.log[0]):
        results = Path(snakemake.output[0]).parent
        write_json(
            record_of_run(snakemake.params.config, list(snakemake.input), results), snakemake.output[0]
        )
