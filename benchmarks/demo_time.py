"""Split the time of the demo: the work of each rule, the start-up of its scripts, Snakemake's own.

Usage::

    python benchmarks/demo_time.py [--cores 2]

Runs the demo of the committed tree in a clone of its own. The work of a job is what its record says: what the
script does once its imports are done. Start-up is Python and these imports, measured by themselves, times the
jobs that run the script.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "lib"))

from record import ROOT, provenance, write_result

# Rules whose script has another name.
SCRIPTS = {"umap": "umap_cells"}
START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='start')"


def seconds_of(command: list[str], folder: Path) -> float:
    """Wall-clock seconds of a command, which has to succeed; what it says goes to standard error."""
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def main() -> None:
    """Measure and write ``demo_time.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=2, help="of Snakemake (default: 2)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of each start-up; medians are taken (default: 3)"
    )
    arguments = parser.parse_args()
    made_by = provenance(__file__, arguments)
    snakemake = [sys.executable, "-m", "snakemake", "--configfile", "config/config.yaml"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "demo"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        planning = seconds_of([*snakemake, "--dry-run", "--quiet", "all"], folder)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = seconds_of([*snakemake, "--cores", str(arguments.cores)], folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        jobs = json.loads((folder / "results" / "provenance.json").read_text(encoding="utf-8"))["jobs"]
        number = Counter(job["rule"] for job in jobs.values())
        rows = []
        for rule in number:
            script = f"workflow/scripts/{SCRIPTS.get(rule, rule)}.py"
            command = [sys.executable, "-c", START, script]
            start = statistics.median(seconds_of(command, folder) for _ in range(arguments.repeats))
            work = sum(job["seconds"] for job in jobs.values() if job["rule"] == rule)
            rows.append((rule, number[rule], work, number[rule] * start, start))
    columns = ["rule", "jobs", "work_s", "start_up_s", "start_up_of_one_s"]
    table = pd.DataFrame(rows, columns=columns).sort_values("work_s", ascending=False)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    write_result(
        "demo_time",
        made_by,
        table,
        wall_s=round(wall, 1),
        processor_s=round(processor, 1),
        planning_s=round(planning, 1),
        work_s=round(table["work_s"].sum(), 1),
        start_up_s=round(table["start_up_s"].sum(), 1),
    )


if __name__ == "__main__":
    main()
