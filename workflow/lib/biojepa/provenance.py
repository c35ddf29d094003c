"""Say how a result was made: versions, commit, settings, checksums."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from biojepa.files import sha256_of

PACKAGES = (
    "snakemake",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "anndata",
    "scanpy",
    "scikit-learn",
    "gseapy",
    "plotly",
    "h5py",
    "umap-learn",
)


def package_versions() -> dict[str, str]:
    """Versions of the packages that make results and are installed here, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit_of(folder: str | Path) -> str:
    """Commit of a checkout, with ``-dirty`` when tracked files were changed, or ``not a git checkout``."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return "not a git checkout"
    return answer.stdout.strip() if answer.returncode == 0 else "not a git checkout"


def environment() -> dict[str, Any]:
    """Versions and machine, for the provenance of a result."""
    return {"packages": package_versions(), "machine": machine()}


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name system, processor, cores and memory of this machine, the same in each run on it.

    A GPU is named by what uses one: the record of a training.
    """
    parts = [f"{platform.system()} {platform.machine()}", _processor(cpuinfo)]
    cores = os.cpu_count()
    if cores:
        parts.append(f"{cores} core" + ("" if cores == 1 else "s"))
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        memory = 0
    if memory > 0:
        parts.append(f"{memory / 2**30:.0f} GiB of memory")
    return ", ".join(filter(None, parts))


def _processor(cpuinfo: Path) -> str:
    """Return the name of the processor, empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        name = platform.processor()
        return "" if name == platform.machine() else name
    found = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return " ".join(next(found, "").split())


def record_of_run(
    config: dict[str, Any], files: Sequence[str | Path], benchmarks: Path, checkout: Path
) -> dict[str, Any]:
    """Collect what a reader of the results needs to make them again.

    Parameters
    ----------
    config
        Resolved settings of each dataset.
    files
        Results whose SHA-256 is recorded.
    benchmarks
        Folder of Snakemake's benchmark tables: seconds and peak memory (MB, resident) of each job.
    checkout
        A folder of the pipeline's checkout.
    """
    jobs = {}
    # Of these datasets alone: the folder may hold jobs of earlier runs with others.
    for path in sorted(path for dataset in config for path in (benchmarks / dataset).rglob("*.tsv")):
        table = pd.read_csv(path, sep="\t", na_values=["-", "NA"])
        jobs[path.relative_to(benchmarks).with_suffix("").as_posix()] = {
            "seconds": float(table["s"].iloc[-1]),
            "max_rss_mb": None if pd.isna(table["max_rss"].iloc[-1]) else float(table["max_rss"].iloc[-1]),
        }
    return {
        **environment(),
        "commit": commit_of(checkout),
        "config": config,
        "sha256": {str(path): sha256_of(path) for path in files},
        "jobs": jobs,
    }
