"""Put everything that was measured on one dataset and split on one page.

Question: can this screen's unseen perturbations be predicted, and should one believe it?
Method: the tables of `evaluate` are shown with their intervals, controls and captions; nothing is
scored here but the length of predicted and observed changes (log1p units, against the training mean).
Outputs: the page itself, the headline table, and two still figures for Snakemake's own report.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import write_text, write_tsv
from biojepa.jobs import recorded_job
from biojepa.provenance import environment, inputs_from_outside
from biojepa.report import build_report
from biojepa.report.read import ReportFiles, Run, read_report
from biojepa.report.static import calibration_svg, scatter_svg
from biojepa.report.tables import headline_frame


def paths(files) -> list[Path]:
    """Return the paths of one named input, which may be one file, several or none."""
    return [Path(files)] if isinstance(files, str) else [Path(path) for path in files]


def main(snakemake) -> None:
    """Read, build and write the report of one dataset and split."""
    source, params = snakemake.input, snakemake.params
    files = ReportFiles(
        metrics=Path(source.metrics),
        summary=Path(source.summary),
        enrichment=Path(source.enrichment),
        verdict=Path(source.verdict),
        observed=Path(source.observed),
        splits=paths(source.splits_info),
        qc=Path(source.qc),
        perturbations=Path(source.perturbations),
        predictions=paths(source.predictions),
        prediction_runs=[Run.of(record) for record in params.predictions],
        histories=paths(source.get("histories", [])),
        train_metrics=paths(source.get("train_metrics", [])),
        history_runs=[Run.of(record) for record in params.get("histories", [])],
        umaps=paths(source.get("umap", [])),
        coverage=paths(source.get("coverage", [])),
        strata=next(iter(paths(source.get("strata", []))), None),
        trust=next(iter(paths(source.get("trust", []))), None),
        representation=paths(source.get("representation", [])),
    )
    results = Path(source.metrics).parents[3]
    inputs = read_report(
        files,
        dataset=params.dataset,
        split=params.split,
        settings=params.get("settings", {}),
        provenance=params.get("provenance")
        or environment() | {"inputs": inputs_from_outside(source, results)},
        page=Path(snakemake.output.html),
        qc_page=params.get("qc_page", ""),
    )
    write_text(build_report(inputs), snakemake.output.html)
    write_tsv(headline_frame(inputs), snakemake.output.headline)
    write_text(calibration_svg(inputs), snakemake.output.calibration)
    write_text(scatter_svg(inputs), snakemake.output.scatter)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
