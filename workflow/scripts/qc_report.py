"""Put the quality of one screen on one page.

Question: can its cells, guides and perturbations be trusted?
Method: shows the tables of `preprocess`, sums up the kept cells, and lays a random sample of at most 3,000 of
them out by principal components of log-expression (UMAP). Nothing here is used by any other stage.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import read_tsv, write_text
from biojepa.jobs import recorded_job
from biojepa.provenance import environment
from biojepa.qc_report import QcInputs, build_qc_report
from biojepa.qc_report.read import read_cell_facts, read_cell_map

TABLES = (
    "qc", "perturbations", "guides", "guide_calls", "guides_per_cell", "guide_umis", "batches",
    "distributions",
)  # fmt: skip


def main(snakemake) -> None:
    """Read the tables and the cells, and write the page."""
    source, params = snakemake.input, snakemake.params
    inputs = QcInputs(
        dataset=params.dataset,
        **{name: read_tsv(source[name]) for name in TABLES},
        cells=read_cell_facts(source.cells),
        cell_map=read_cell_map(source.cells, params.settings["seed"]),
        settings=params.settings,
        provenance=environment(),
        reports={"index of all reports": "../../index.html"},
        files=tuple(Path(source[name]).name for name in TABLES),
    )
    write_text(build_qc_report(inputs), snakemake.output.html)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
