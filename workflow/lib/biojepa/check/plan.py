"""How many jobs a run would have, what it would fetch, and what that may cost."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biojepa.catalogue import Entry
from biojepa.check.screen import Screen
from biojepa.config import Config
from biojepa.contracts import NO_SPLIT
from biojepa.disk import free_bytes, size_text
from biojepa.models import encoder_source, is_baseline, is_head, resolve_settings

# Processor seconds and peak GiB of docs/performance.md (benchmarks/results/scaling.json): 5,000 genes, 8 % of
# the matrix filled, one thread. Cells, perturbations, seconds, GiB. Of training, 50 steps of each stage.
MEASURED: dict[str, tuple[tuple[int, int, float, float], ...]] = {
    "preprocess": (
        (10_000, 1_000, 17.3, 0.69),
        (100_000, 1_000, 37.6, 0.76),
        (1_000_000, 1_000, 124.6, 1.54),
        (100_000, 100, 17.1, 0.77),
        (100_000, 10_000, 99.1, 1.01),
    ),
    "pair": (
        (10_000, 1_000, 4.2, 0.43),
        (100_000, 1_000, 10.4, 0.47),
        (1_000_000, 1_000, 41.3, 0.75),
        (100_000, 100, 4.1, 0.36),
        (100_000, 10_000, 81.7, 1.81),
    ),
    "train": (
        (10_000, 1_000, 18.3, 1.25),
        (100_000, 1_000, 54.3, 1.47),
        (1_000_000, 1_000, 343.3, 5.98),
        (100_000, 100, 46.9, 1.39),
        (100_000, 10_000, 245.2, 5.00),
    ),
    "embed": (
        (10_000, 1_000, 1.8, 0.65),
        (100_000, 1_000, 12.4, 0.72),
        (1_000_000, 1_000, 149.0, 1.17),
        (100_000, 100, 16.7, 0.72),
        (100_000, 10_000, 16.3, 0.74),
    ),
}
MIDDLE = (100_000, 1_000)
STEPS_INCLUDED = 50
# Processor milliseconds, all threads together, of a step of the default networks: the larger of two screens
# each (benchmarks/results/training_step_cpu.json).
STEP_MS = {"encoder": 101, "predictor": 60}
# Settings that a step's time depends on; others such as steps and rates do not matter.
SIZES = {
    "encoder": (
        "hidden", "num_tokens", "embed_dim", "depth", "heads", "predictor_width", "predictor_depth",
        "batch_size",
    ),
    "predictor": ("width", "depth", "heads", "condition_dim", "population", "batch_size"),
}  # fmt: skip


def count_jobs(arguments: Sequence[str], snakefile: Path) -> tuple[dict[str, int], str]:
    """Ask Snakemake how many jobs of each rule it would run; results that are there need none.

    Parameters
    ----------
    arguments
        Options of the config, as for a run.
    snakefile
        The workflow.

    Returns
    -------
    Rule to jobs, and what Snakemake says where it cannot plan (then no rules).
    """
    command = [sys.executable, "-m", "snakemake", *("--snakefile", str(snakefile)), *("--cores", "1")]
    command += ["--dry-run", "--nolock", "--quiet", "rules", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = [line for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
        start = next((row for row, line in enumerate(said) if re.search(r"Error|Exception", line)), -12)
        return {}, "\n".join(said[start:][:12])
    rows = re.findall(r"^(\w+)\s+(\d+)\s*$", answer.stdout + answer.stderr, flags=re.MULTILINE)
    return {rule: int(n) for rule, n in rows if rule not in ("all", "total", "job")}, ""


def files_of(config: Config, dataset: str, catalogue: Mapping[str, Entry]) -> list[dict[str, Any]]:
    """List the files that a row names: whether they are there, and bytes where they are known."""
    row = config.source(dataset)
    entry = catalogue.get(dataset)
    same = entry is not None and entry.row.get("source") == row.row["source"]
    gigabytes = entry.descriptions["gigabytes"] if entry is not None and same else ""
    files = []
    for file in row.files:
        here = Path(f"{row.folder}/{file.name}" if file.is_remote else file.address)
        held = [here] if here.is_file() else here.iterdir() if here.is_dir() else []
        size = sum(one.stat().st_size for one in held if one.is_file()) if here.exists() else None
        if size is None and file.is_remote and gigabytes and len(row.files) == 1:
            size = round(float(gigabytes) * 1e9)
        state = "there" if here.exists() else "to fetch" if file.is_remote else "missing"
        files.append({"address": file.address, "state": state, "bytes": size, "checksum": file.checksum})
    return files


def space_problem(files: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Say that the disk cannot hold what is to be fetched, as far as sizes are known; else nothing."""
    needed = sum(file["bytes"] or 0 for file in files if file["state"] == "to fetch")
    free = free_bytes(folder)
    if needed <= free:
        return ""
    return (
        f"{folder.resolve()}: found {size_text(free)} free; expected {size_text(needed)} for downloads. Fix: "
        "free some space, or run in a folder on another disk"
    )


def measured_cost(stage: str, cells: int, perturbations: int) -> tuple[float, float]:
    """Interpolate what was measured, on logarithms of cells and of perturbations.

    Below the smallest screen measured, its figures are taken; above the largest, the last slope goes on, but
    no less than in proportion for seconds over cells.

    Returns
    -------
    Processor seconds and peak GiB of one job.
    """
    rows = MEASURED[stage]
    middle = next(row for row in rows if row[:2] == MIDDLE)
    costs = []
    for column, proportional in ((2, 1.0), (3, 0.0)):
        over_cells = [(row[0], row[column]) for row in rows if row[1] == MIDDLE[1]]
        over_labels = [(row[1], row[column]) for row in rows if row[0] == MIDDLE[0]]
        at_cells = _interpolated(over_cells, cells, proportional)
        at_labels = _interpolated(sorted(over_labels), perturbations, proportional)
        costs.append(at_cells * at_labels / middle[column])
    return costs[0], costs[1]


def _interpolated(points: Sequence[tuple[int, float]], at: int, least_slope: float) -> float:
    x, y = (np.log([point[column] for point in points]) for column in (0, 1))
    wanted = math.log(max(at, 1))
    if wanted > x[-1]:
        slope = max((y[-1] - y[-2]) / (x[-1] - x[-2]), least_slope)
        return float(np.exp(y[-1] + slope * (wanted - x[-1])))
    return float(np.exp(np.interp(wanted, x, y)))


def estimate(
    config: Config, screens: Mapping[str, Screen], jobs: Mapping[str, int], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Estimate time and memory of the jobs of stages that were measured.

    Parameters
    ----------
    config, screens
        The checked config, and what is known of its screens.
    jobs
        Rule to jobs; where they are fewer than in a fresh run, each dataset counts by its folds.
    defaults
        Section ``train`` with all defaults: networks of other sizes were not measured.

    Returns
    -------
    ``rules`` (rule to ``jobs``, processor ``seconds`` of all of them, peak ``gib`` of one),
    ``not_measured`` (rules), and ``missing`` (datasets without a number of cells).
    """
    sizes, missing = {}, []
    for name, screen in screens.items():
        cells = screen.facts.get("cells", screen.facts.get("labelled_cells"))
        if cells is None:
            cells = screen.facts.get("simulated", {}).get("n_cells")
        if cells is None:
            missing.append(name)
            continue
        asked = screen.facts.get("simulated", {})
        drawn = asked.get("n_singles", 0) + asked.get("n_combinations", 0)
        known = screen.facts.get("perturbations", drawn or len(screen.targets) or MIDDLE[1])
        sizes[name] = (int(cells), int(known))
    rules: dict[str, Any] = {}
    for rule in (rule for rule in MEASURED if rule in jobs and rule != "train"):
        own = [name for name in sizes if rule == "preprocess" or name in config.datasets]
        weight = {name: 1 if rule == "preprocess" else _folds(config, name) for name in own}
        costs = {name: measured_cost(rule, *sizes[name]) for name in own}
        if sum(weight.values()):
            mean = sum(weight[name] * costs[name][0] for name in own) / sum(weight.values())
            rules[rule] = {
                "jobs": jobs[rule],
                "seconds": jobs[rule] * mean,
                "gib": max(cost[1] for cost in costs.values()),
            }
    training = _training_cost(config, sizes, defaults)
    if "train" in jobs and training is not None:
        seconds, gib = training
        rules["train"] = {"jobs": jobs["train"], "seconds": jobs["train"] * seconds, "gib": gib}
    quick = ("index", "provenance", "freeze_split", "unevaluated")
    not_measured = [rule for rule in jobs if rule not in rules and rule not in quick]
    return {"rules": rules, "not_measured": not_measured, "missing": missing}


def _folds(config: Config, dataset: str) -> int:
    return sum(len(config.folds(dataset, scheme)) for scheme in config.schemes)


def _training_cost(
    config: Config, sizes: Mapping[str, tuple[int, int]], defaults: Mapping[str, Any]
) -> tuple[float, float] | None:
    """Mean seconds and largest GiB of a training; None where a network has another size than measured."""
    models = [
        model
        for model in config.models
        if not is_baseline(model) and not is_head(model) and model not in config.user_models
    ]
    seconds, gib = [], []
    for dataset in (name for name in config.datasets if name in sizes):
        train = config.settings(dataset, "train")
        if (
            train["stages"] != "two"
            or train["processes"] != 1
            or any(train[part][key] != defaults[part][key] for part, keys in SIZES.items() for key in keys)
        ):
            return None
        beside, memory = measured_cost("train", *sizes[dataset])
        gib.append(memory)
        for model in models:
            settings = resolve_settings(model, train)
            own_encoder = encoder_source(model) is None and settings["embedding"] not in ("pca", "untrained")
            steps = {"encoder": settings["encoder"]["steps"] * own_encoder}
            steps["predictor"] = settings["predictor"]["steps"]
            more = sum(max(n - STEPS_INCLUDED, 0) * STEP_MS[part] / 1000 for part, n in steps.items())
            seconds.append(beside + more)
    return (sum(seconds) / len(seconds), max(gib)) if seconds else None


def models_of(config: Config) -> dict[str, Any]:
    """Say what is compared, on which schemes, folds and seeds."""
    return {
        "models": config.models,
        "schemes": config.schemes,
        "evaluated": [scheme for scheme in config.schemes if scheme != NO_SPLIT],
        "seeds": config.seeds,
    }
