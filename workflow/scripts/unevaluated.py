"""Write the page of models that were trained on everything: what they are, and that nothing is evaluated."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.files import write_text
from biojepa.jobs import recorded_job
from biojepa.provenance import environment
from biojepa.report.unevaluated import UnevaluatedInputs, build_unevaluated


def read(path) -> dict:
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def main(snakemake) -> None:
    """Read what the trainings recorded and write the page."""
    source, params = snakemake.input, snakemake.params
    (split,) = source.splits_info
    inputs = UnevaluatedInputs(
        dataset=params.dataset,
        split=read(split),
        trainings=[
            {"model": run["model"], "seed": run["seed"], "metrics": read(path)}
            for run, path in zip(params.trainings, source.train_metrics, strict=True)
        ],
        reports={scheme: f"../{scheme}/report.html" for scheme in params.schemes},
        predictions="../predict/predictions.tsv" if params.predicts else None,
        qc_page=params.qc_page,
        settings=params.settings,
        provenance=environment(),
    )
    write_text(build_unevaluated(inputs), snakemake.output.html)


if __name__ == "__main__":
    with recorded_job(snakemake):
        main(snakemake)
