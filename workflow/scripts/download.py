"""Fetch a published screen, whole and verified.

Continues interrupted transfers, compares the checksum of the dataset table before the file gets its
name, and records the checksum that was seen where none is known.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.download import download_file
from biojepa.jobs import recorded_job

if __name__ == "__main__":
    with recorded_job(snakemake):
        download_file(snakemake.params.url, snakemake.output.file, snakemake.params.checksum)
