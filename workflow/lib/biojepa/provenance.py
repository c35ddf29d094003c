"""Say how a result was made: versions, commit, settings, checksums."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from biojepa.files import sha256_of

RECORDS = "provenance"
"""Folder of the records of jobs, beside the files that they speak of."""

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
    """Commit of this library, versions and machine, for the provenance of a result."""
    return {"commit": commit_of(Path(__file__).parent), "packages": package_versions(), "machine": machine()}


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


def inputs_from_outside(files: Iterable[str | Path], results: str | Path) -> dict[str, str]:
    """Return path and SHA-256 of everything outside the results that some files were made of, as recorded.

    What those files came from in turn is left out, so that an archive of the results gives the same answer.
    """

    def inside(path: str) -> bool:
        return Path(path).is_relative_to(results)

    return {
        path: digest
        for job in jobs_behind(files).values()
        if any(map(inside, job["outputs"]))
        for path, digest in sorted(job["inputs"].items())
        if not inside(path)
    }


_PARTS = ("wildcards", "inputs", "outputs")


def records_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the records of jobs that lie in a folder, by path; what is no record is passed over."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in _PARTS):
            found[str(path)] = record
    return found


def jobs_behind(files: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Follow the records from some files to those of every job that they came from.

    Returns
    -------
    dict
        Wildcards and rule, such as ``demo/perturbation/0/biojepa/0/train``, to the record. A file whose
        record is lost, as in an archive, or that no job made, ends its branch.
    """
    jobs: dict[str, dict[str, Any]] = {}
    records: dict[Path, dict[str, dict[str, Any]]] = {}
    waiting, seen = [str(path) for path in files], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        folder = Path(name).parent / RECORDS
        if folder not in records:
            records[folder] = records_in(folder)
        for record in records[folder].values():
            if name in record["outputs"]:
                jobs[_name(record)] = record
                waiting.extend(record["inputs"])
    return dict(sorted(jobs.items()))


def _name(record: dict[str, Any]) -> str:
    """Name a job by its wildcards, from the widest to the narrowest, and its rule."""
    order = ("dataset", "split", "fold", "model", "seed")
    wildcards = record["wildcards"]
    names = [name for name in order if name in wildcards] + sorted(wildcards.keys() - set(order))
    return "/".join([*(str(wildcards[name]) for name in names), str(record.get("rule"))])


def record_of_run(config: dict[str, Any], files: Sequence[str | Path]) -> dict[str, Any]:
    """Collect what a reader of the results needs to make them again.

    Parameters
    ----------
    config
        Resolved settings of each dataset.
    files
        Results whose SHA-256 is recorded, and that of all they came from.

    Returns
    -------
    dict
        ``commit``, ``packages`` and ``machine`` of this job, ``config``, ``sha256`` of every file and
        ``jobs``, see :func:`jobs_behind`.
    """
    jobs = jobs_behind(files)
    made = {path: identity["sha256"] for job in jobs.values() for path, identity in job["outputs"].items()}
    given = {path: digest for job in jobs.values() for path, digest in job["inputs"].items()}
    return {
        **environment(),
        "config": config,
        "sha256": given | made | {str(path): sha256_of(path) for path in files},
        "jobs": jobs,
    }
