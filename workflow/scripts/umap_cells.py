"""Draw the map of the embedding that the report shows: UMAP of at most 3,000 cells, drawn at random.

A map for the eye only: distances in it mean little, and nothing is measured on it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import write_tsv
from biojepa.jobs import recorded_job
from biojepa.map import map_embedding

if __name__ == "__main__":
    with recorded_job(snakemake):
        table = map_embedding(snakemake.input.embeddings, snakemake.input.split, snakemake.params.seed)
        write_tsv(table, snakemake.output.umap)
