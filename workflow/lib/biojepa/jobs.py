"""Run the work of a rule: send what it says to its log, and leave a record of how its files were made.

The record lies in the folder ``provenance`` beside the files, so that a table found in an archive a year
later still says which code, packages, inputs and settings it came from. It is apart from the tables because
it holds times, and tables of equal content must be equal byte by byte.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biojepa.files import sha256_of, write_json
from biojepa.logs import log_to
from biojepa.provenance import RECORDS, environment, records_in

NOT_SETTINGS = ("library",)
"""Parameters of a rule that are no settings: the digest of its code, for which the record has the commit."""


@contextmanager
def recorded_job(snakemake: Any) -> Iterator[dict[str, Any]]:
    """Run the block with the log of a job, and write its record when it has succeeded.

    Parameters
    ----------
    snakemake
        The object that Snakemake gives a script. Its output ``record`` names the record, or several where
        a job writes into several folders.

    Yields
    ------
    A dict for what the job alone knows, to be merged into the record. It has ``inputs``, path to SHA-256.
    """
    began = time.monotonic()
    with log_to(snakemake.log[0]):
        # Before the work: what a user changes while it runs is not what it ran with.
        before = _before(snakemake)
        known: dict[str, Any] = {"inputs": before["inputs"]}
        yield known
        record = before | _after(snakemake, time.monotonic() - began) | known
        for path in listed(snakemake.output.get("record", [])):
            write_json(record, path)


def _before(snakemake: Any) -> dict[str, Any]:
    """Return what is known of a job before its work.

    Returns
    -------
    dict
        ``rule``, ``wildcards``, ``settings`` (the parameters of the rule), ``config`` (as the user gave
        it), ``seeds`` (every setting and wildcard whose name speaks of one), ``inputs`` (path to SHA-256;
        the frozen split is among them), ``commit``, ``packages``, ``machine`` and ``threads``.
    """
    settings = {key: value for key, value in snakemake.params.items() if key not in NOT_SETTINGS}
    wildcards = dict(snakemake.wildcards.items())
    return {
        "rule": snakemake.rule,
        "wildcards": wildcards,
        "settings": _plain(settings),
        "config": _plain(snakemake.config),
        "seeds": dict(_seeds({**wildcards, **_plain(settings)})),
        "inputs": dict(_checksums(snakemake.input)),
        **environment(),
        "threads": snakemake.threads,
    }


def _after(snakemake: Any, seconds: float) -> dict[str, Any]:
    """Return what is known after it.

    Returns
    -------
    dict
        ``outputs`` (path to SHA-256, bytes and time of change), ``device``, ``seconds``, ``peak_memory_mb``
        and ``finished`` (UTC).
    """
    record = set(listed(snakemake.output.get("record", [])))
    return {
        "outputs": {
            str(file): _identity(file)
            for path in snakemake.output
            if path not in record
            for file in _files_at(Path(path), inner=True)
        },
        "device": device_used(),
        "seconds": round(seconds, 2),
        "peak_memory_mb": _peak_memory(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_used() -> str:
    """Name the GPU if this process has used one, else ``cpu``. Does not import torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "cpu"


def listed(paths: str | Iterable[str]) -> list[str]:
    """Return the paths of a named input or output, which is a string where it is one file."""
    return [paths] if isinstance(paths, str) else list(paths)


def _plain(value: Any) -> Any:
    """Return settings as JSON can hold them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(content) for key, content in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if hasattr(value, "item") and not getattr(value, "shape", ()):  # a number of NumPy
        return _plain(value.item())
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return str(value)


def _seeds(content: Mapping[str, Any] | list[Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every key that speaks of a seed; items of lists are numbered."""
    named = content.items() if isinstance(content, Mapping) else enumerate(content)
    for key, value in named:
        if "seed" in str(key).lower():
            yield f"{place}{key}", value
        elif isinstance(value, Mapping | list):
            yield from _seeds(value, f"{place}{key}.")


def _checksums(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield path and SHA-256 of every input file, and of every file in an input folder."""
    recorded: dict[Path, dict[str, Any]] = {}
    for name in dict.fromkeys(paths):
        path = Path(name)
        # The record of a folder that a job made lies beside the folder, as that of a file does.
        for folder in (path.parent, path):
            if folder not in recorded:
                recorded[folder] = _recorded(folder / RECORDS)
        known = recorded[path] | recorded[path.parent]
        is_made = any(Path(made).is_relative_to(path) for made in recorded[path.parent])
        for file in _files_at(path, inner=is_made):
            yield str(file), _checksum(file, known.get(str(file)))


def _files_at(path: Path, *, inner: bool) -> list[Path]:
    """List the files of a folder, with ``inner`` at every depth, or a file itself.

    Left out is the hidden file in which Snakemake keeps the time of a folder.
    """
    if not path.is_dir():
        return [path] if path.is_file() else []
    files = path.rglob("*") if inner else path.iterdir()
    return sorted(file for file in files if file.is_file() and file.name != ".snakemake_timestamp")


def _checksum(file: Path, known: Mapping[str, Any] | None) -> str:
    """Return the checksum that the record of the file's own job has, if the file is as it was then."""
    if known is not None:
        state = file.stat()
        if (known["bytes"], known["modified_ns"]) == (state.st_size, state.st_mtime_ns):
            return str(known["sha256"])
    return sha256_of(file)


def _recorded(folder: Path) -> dict[str, Any]:
    """Return what the records of a folder say of its files, by path."""
    return {
        path: known for record in records_in(folder).values() for path, known in record["outputs"].items()
    }


def _identity(path: Path) -> dict[str, Any]:
    state = path.stat()
    return {"sha256": sha256_of(path), "bytes": state.st_size, "modified_ns": state.st_mtime_ns}


def _peak_memory() -> int:
    """Return the highest resident memory of this process, or of one that it started, in MB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return round(max(resource.getrusage(one).ru_maxrss for one in who) / unit)
