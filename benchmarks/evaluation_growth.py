"""Measure how seconds and memory of the evaluation and the report grow with the number of perturbations.

Question: is there a part whose time is quadratic in the perturbations, so that a genome-wide screen cannot
be evaluated? Method: ``evaluation_speed.py`` with 100, 1,000 and 10,000 perturbations × 1,000 genes × 6
models, each in a process of its own; without prerank, whose number of perturbations is limited by a setting.
Exponents are slopes of the logarithms between the two largest; parts below a second are left out.

Usage::

    python benchmarks/evaluation_growth.py [--perturbations 100 1000 10000] [--genes 1000] [--models 6]

Writes ``benchmarks/results/evaluation_growth.json``. Linux only, as ``evaluation_speed.py``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "lib"))

from record import RESULTS, provenance, write_result

SPEED = Path(__file__).with_name("evaluation_speed.py")
NAME = "evaluation_growth"
MIN_SECONDS = 1.0


def measured(n: int, arguments: argparse.Namespace) -> pd.DataFrame:
    """Run ``evaluation_speed.py`` with ``n`` perturbations and return its table."""
    name = f"{NAME}_{n}"
    sizes = ["--perturbations", str(n), "--genes", str(arguments.genes), "--models", str(arguments.models)]
    subprocess.run(
        [sys.executable, str(SPEED), *sizes, "--no-prerank", "--name", name], check=True, stdout=sys.stderr
    )
    path = RESULTS / f"{name}.json"
    table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["table"])
    path.unlink()
    return table.assign(perturbations=n)


def main() -> None:
    """Measure all sizes and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--perturbations", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--genes", type=int, default=1_000)
    parser.add_argument("--models", type=int, default=6)
    arguments = parser.parse_args()
    made_by = provenance(__file__, arguments)
    sizes = sorted(arguments.perturbations)
    table = pd.concat([measured(n, arguments) for n in sizes], ignore_index=True)
    growth = []
    for part, rows in table.groupby("part", sort=False):
        last = rows[rows["perturbations"].isin(sizes[-2:])].sort_values("perturbations")
        if len(last) == 2 and last["processor_seconds"].iloc[1] >= MIN_SECONDS:
            steps = np.diff(np.log(last[["perturbations", "processor_seconds", "peak_gib"]]), axis=0)[0]
            growth.append(
                {"part": part, "processor_seconds": steps[1] / steps[0], "peak_gib": steps[2] / steps[0]}
            )
    exponents = pd.DataFrame(growth).sort_values("processor_seconds", ascending=False)
    print(exponents.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    columns = ["part", "perturbations", "seconds", "processor_seconds", "peak_gib"]
    fitted = json.loads(exponents.round(3).to_json(orient="records"))
    write_result(NAME, made_by, table[columns], exponents=fitted)


if __name__ == "__main__":
    main()
