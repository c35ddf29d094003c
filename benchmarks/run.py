"""List the benchmarks of this folder, run them, and print all results as tables.

Usage::

    python benchmarks/run.py                      # what there is, and what each needs
    python benchmarks/run.py run training_step …  # or: run all
    python benchmarks/run.py table [NAME …]       # benchmarks/results as Markdown

``run`` makes inputs that are missing with snakemake where no data are needed from elsewhere, goes on after a
failure, and ends with the tables of what it measured. A benchmark whose inputs are missing is named and
skipped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO_PAIRS = "results/demo/perturbation/fold0/pair/pairs.h5"


@dataclass(frozen=True)
class Benchmark:
    """One measurement.

    Attributes
    ----------
    question
        What it answers.
    command
        Script below ``benchmarks/`` and its arguments.
    inputs
        Files that it reads, from the repository's root.
    made_by
        Arguments of snakemake that make them; empty where they need data of the user's.
    """

    question: str
    command: str
    inputs: tuple[str, ...] = ()
    made_by: str = ""


BENCHMARKS: Mapping[str, Benchmark] = {
    "training_step": Benchmark(
        "seconds per training step against a plain loop, a count VAE, a diffusion model and SCVI",
        "training_speed.py step results/demo",
        (DEMO_PAIRS,),
        f"{DEMO_PAIRS} --cores 2",
    ),
    "training_arithmetic": Benchmark(
        "operations, TFLOP/s, share of the ceiling and memory of the reference model",
        "training_speed.py arithmetic --threads 1 --batch 32",
    ),
    "training_quality": Benchmark(
        "quality on held-out perturbations per second of training, against generative models",
        "training_speed.py quality results/norman_tiny --folds 0 1 2 3 4 --threads 1 --shares 0.1 0.25 1 "
        "--epochs 5 10 20 40 80",
        tuple(f"results/norman_tiny/perturbation/fold{fold}/pair/pairs.h5" for fold in range(5)),
    ),
    "evaluation_speed": Benchmark(
        "seconds and memory of evaluation and report at 2,000 perturbations", "evaluation_speed.py"
    ),
    "evaluation_growth": Benchmark(
        "growth of seconds and memory of evaluation and report to 10,000 perturbations",
        "evaluation_growth.py",
    ),
    "scaling": Benchmark(
        "growth of seconds and memory with cells and perturbations, to a million and to 10,000", "scaling.py"
    ),
    "preprocess_against_scanpy": Benchmark(
        "preprocess against plain scanpy in memory, same result", "preprocess_against_scanpy.py"
    ),
    "demo_time": Benchmark("the demo's time by rule: what is start-up, what is work", "demo_time.py"),
    "training_choices": Benchmark(
        "what parts of the model and settings of its training contribute",
        "compare_training.py results/development_1 results/development_2 results/development_3 "
        "--workers 2 --name training_choices",
        tuple(f"results/development_{i}/preprocess/cells.h5ad" for i in (1, 2, 3)),
        "paired --cores 2 --configfile benchmarks/development.yaml",
    ),
}


def missing_inputs(benchmark: Benchmark) -> list[str]:
    """Name the inputs that are not there."""
    return [name for name in benchmark.inputs if not (ROOT / name).exists()]


def run(names: Sequence[str]) -> int:
    """Run benchmarks one after the other; return the number of those that failed or were skipped."""
    before, failed = _written(), 0
    for name in names:
        benchmark = BENCHMARKS[name]
        if missing_inputs(benchmark) and benchmark.made_by:
            _call(["-m", "snakemake", *shlex.split(benchmark.made_by)])
        if missing := missing_inputs(benchmark):
            print(f"{name}: skipped, for there is no {missing[0]}. See benchmarks/README.md", file=sys.stderr)
            failed += 1
            continue
        script, *arguments = shlex.split(benchmark.command)
        print(f"{name}: python benchmarks/{benchmark.command}", file=sys.stderr, flush=True)
        if _call([f"benchmarks/{script}", *arguments]):
            print(f"{name}: failed", file=sys.stderr)
            failed += 1
    changed = [name for name, written in _written().items() if before.get(name) != written]
    print(tables(changed) if changed else "")
    return failed


def _call(arguments: Sequence[str]) -> int:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode


def _written() -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in sorted(RESULTS.glob("*.json"))}


def tables(names: Sequence[str], folder: Path = RESULTS) -> str:
    """Write results as Markdown, each with how it was made; a column for every key that a row has.

    Parameters
    ----------
    names
        Of files in ``folder``, without their ending.
    """
    parts = []
    for name in names:
        path = folder / f"{name}.json"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
            raise FileNotFoundError(f"no result {path}; there are: {known}. Run the benchmark first")
        content = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"## {name}\n\n{_origin(content)}\n\n{_table(content['table'])}")
    return "\n\n".join(parts)


def _origin(content: Mapping[str, Any]) -> str:
    made_by = content["made_by"]
    where = [made_by.get("machine"), content.get("device")]
    told = ", ".join(str(part) for part in where if part)
    torch = made_by.get("packages", {}).get("torch")
    return f"`{made_by['script']}` at commit {made_by['commit']}; {told}" + (
        f"; torch {torch}" if torch else ""
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if any(isinstance(row.get(c), (int, float)) for row in rows)}
    # Files are sorted by key; what a row is about comes first.
    columns.sort(key=lambda column: column in numeric)
    lines = [_line(columns), _line("---:" if c in numeric else "---" for c in columns)]
    return "\n".join([*lines, *(_line(_cell(row.get(c)) for c in columns) for row in rows)])


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def listing() -> str:
    """Say what there is."""
    lines = []
    for name, benchmark in BENCHMARKS.items():
        missing = missing_inputs(benchmark)
        state = (
            "" if not missing else " (makes its inputs first)" if benchmark.made_by else " (inputs missing)"
        )
        lines += [f"{name}{state}", f"    {benchmark.question}", f"    python benchmarks/{benchmark.command}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="what")
    running = parts.add_parser("run", help="run benchmarks")
    running.add_argument("names", nargs="+", choices=[*BENCHMARKS, "all"])
    parts.add_parser("table", help="print results").add_argument("names", nargs="*")
    given = parser.parse_args(arguments)
    if given.what == "run":
        return min(1, run(list(BENCHMARKS) if "all" in given.names else given.names))
    if given.what == "table":
        try:
            print(tables(given.names or list(_written())))
        except FileNotFoundError as error:
            parser.error(str(error))
    else:
        print(listing())
    return 0


if __name__ == "__main__":
    sys.exit(main())
