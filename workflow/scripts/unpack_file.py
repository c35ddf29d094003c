"""Get the one file that a screen consists of out of a verified archive or a gzip file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.download import unpack_file
from biojepa.jobs import recorded_job

if __name__ == "__main__":
    with recorded_job(snakemake):
        unpack_file(snakemake.input[0], snakemake.output.file)
