"""Get one raw file of a screen, whole and verified.

Continues interrupted transfers, compares the checksum of the dataset table before the file gets its
name, and records the checksum that was seen where none is known. A local file is verified where it is
and linked to.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.download import download_file, link_file
from biojepa.jobs import recorded_job

if __name__ == "__main__":
    with recorded_job(snakemake):
        file, checksum = snakemake.output.file, snakemake.params.checksum
        if snakemake.input:
            link_file(snakemake.input[0], file, checksum)
        else:
            download_file(snakemake.params.url, file, checksum)
