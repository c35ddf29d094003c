"""Unpack the verified archives of a screen into one folder.

Only plain files with plain names are taken, within bounds of size; an archive that holds anything else is
refused as a whole.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.download import unpack_archives
from biojepa.jobs import recorded_job

if __name__ == "__main__":
    with recorded_job(snakemake):
        unpack_archives(list(snakemake.input), snakemake.output.folder)
