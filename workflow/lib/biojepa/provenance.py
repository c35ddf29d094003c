"""Say how a result was made: versions, commit, settings, checksums."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from biojepa.files import sha256_of

log = logging.getLogger(__name__)

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
    "scikit-image",
    "scikit-learn",
    "pot",
    "gseapy",
    "h5py",
    "plotly",
    "matplotlib",
    "jinja2",
    "umap-learn",
    "requests",
    "tqdm",
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
    """Commit of the checkout that tracks the files of a folder, with ``-dirty`` when tracked files changed.

    ``not a git checkout`` where none does, as for a copy that was unpacked inside another project's, and
    where git is absent, refuses the folder of another owner, or does not answer in 20 seconds: nothing a job
    should fail for.
    """
    git = ["git", "-C", str(folder)]
    describe = ["describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        answers = [
            subprocess.run(
                [*git, *command], capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for command in (["ls-files", "."], describe)
        ]
    except (OSError, subprocess.SubprocessError):
        answers = [""]
    return answers[-1] if all(answers) else "not a git checkout"


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

    Paths of the records are those of the run. Where results were moved since, with all that is in them, they
    are translated, so that the answer names files where they are.

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
        # The record of a file that was unpacked into a folder lies beside that folder, so further up.
        for parent in Path(name).parents:
            folder = parent / RECORDS
            if folder not in records:
                records[folder] = records_in(folder)
            found = [moved for record in records[folder].values() if (moved := _translated(record, name))]
            for record in found:
                jobs[_name(record)] = record
                waiting.extend(record["inputs"])
            if found:
                break
    return dict(sorted(jobs.items()))


def _translated(record: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a record with its paths as seen from where its output ``name`` lies now; None if it has none.

    A recorded path and ``name`` are the same file where one is the end of the other.
    """
    if name in record["outputs"]:
        return record
    for made in record["outputs"]:
        if name.endswith(f"/{made}"):
            root = name.removesuffix(made)
            moved = {path: path if Path(path).is_absolute() else root + path for path in _paths(record)}
        elif made.endswith(f"/{name}"):
            root = made.removesuffix(name)
            moved = {path: path.removeprefix(root) for path in _paths(record)}
        else:
            continue
        return record | {
            part: {moved[path]: known for path, known in record[part].items()}
            for part in ("inputs", "outputs")
        }
    return None


def _paths(record: dict[str, Any]) -> list[str]:
    return [*record["inputs"], *record["outputs"]]


def _name(record: dict[str, Any]) -> str:
    """Name a job by its wildcards, from the widest to the narrowest, and its rule."""
    order = ("dataset", "split", "fold", "model", "seed")
    wildcards = record["wildcards"]
    names = [name for name in order if name in wildcards] + sorted(wildcards.keys() - set(order))
    return "/".join([*(str(wildcards[name]) for name in names), str(record.get("rule"))])


def record_of_run(config: dict[str, Any], files: Sequence[str | Path], results: str | Path) -> dict[str, Any]:
    """Collect what a reader of the results needs to make them again.

    Parameters
    ----------
    config
        Resolved settings of each dataset.
    files
        Results whose SHA-256 is recorded, and that of all they came from.
    results
        The folder of all results.

    Returns
    -------
    dict
        ``commit``, ``packages`` and ``machine`` of this job, ``config``, ``sha256`` of every file, ``jobs``,
        see :func:`jobs_behind`, and ``unrecorded``, the results of which no record says how they were made.
    """
    jobs = jobs_behind(files)
    made = {path: identity["sha256"] for job in jobs.values() for path, identity in job["outputs"].items()}
    given = {path: digest for job in jobs.values() for path, digest in job["inputs"].items()}
    known = given | made | {str(path): sha256_of(path) for path in files}
    unrecorded = sorted(path for path in known.keys() - made.keys() if Path(path).is_relative_to(results))
    if unrecorded:
        log.warning(
            "%d results have no record of how they were made, such as %s: they are older than the records, "
            "or their folders %s are lost",
            len(unrecorded),
            unrecorded[0],
            RECORDS,
        )
    return {
        **environment(),
        "config": config,
        "sha256": known,
        # The config as it was given stands in each record; here it is resolved, once.
        "jobs": {name: {k: v for k, v in job.items() if k != "config"} for name, job in jobs.items()},
        "unrecorded": unrecorded,
    }
