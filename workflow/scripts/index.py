"""Compare all datasets, splits and models on one page.

Question: where does the model help, and where can nothing be told?
Method: the pooled summaries and verdicts of `evaluate` side by side, with links to the reports.
Units: those of each metric; gap closed in percent (0 training mean, 100 technical duplicate).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import read_tsv, write_text
from biojepa.jobs import recorded_job
from biojepa.report import IndexEntry, UnevaluatedEntry, build_index


def main(snakemake) -> None:
    """Read the summaries and verdicts and write the index."""
    folder = Path(snakemake.output.html).parent
    reports = []
    for record, summary, verdict in zip(
        snakemake.params.entries, snakemake.input.summaries, snakemake.input.verdicts, strict=True
    ):
        # The report lies beside the folder `evaluate` that holds the summary.
        page = Path(summary).parents[1] / "report.html"
        reports.append(
            IndexEntry(
                dataset=record["dataset"],
                split=record["split"],
                summary=read_tsv(summary),
                verdict=json.loads(Path(verdict).read_text(encoding="utf-8")),
                confidence=record["confidence"],
                href=Path(os.path.relpath(page, folder)).as_posix(),
                qc_href=record["qc_page"],
            )
        )
    unevaluated = [
        UnevaluatedEntry(
            record["dataset"],
            record["split"],
            f"{record['dataset']}/{record['split']}/report.html",
            record["qc_page"],
        )
        for record in snakemake.params.unevaluated
    ]
    write_text(build_index(reports, unevaluated=unevaluated), snakemake.output.html)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
