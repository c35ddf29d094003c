"""Write what a benchmark measured together with all that is needed to measure it again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biojepa.files import sha256_of, write_json
from biojepa.provenance import commit_of, environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance(script: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect script, arguments, checksums of the input files, commit and versions.

    Files are called by their names alone: where they lie on a machine says nothing about a result.
    Call it before the measurement, so that the commit is the one whose code is loaded.
    """
    values = vars(arguments)
    files = [item for value in values.values() if isinstance(value, list) for item in value]
    files = [item for item in [*files, *values.values()] if isinstance(item, Path)]
    return {
        **environment(),
        "commit": commit_of(ROOT),
        "script": Path(script).name,
        "arguments": {key: _without_folders(value) for key, value in values.items()},
        # A list, because the files of several folds share a name.
        "sha256": [{"file": path.name, "sha256": sha256_of(path)} for path in files],
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return value.name if isinstance(value, Path) else value


def write_result(name: str, made_by: Mapping[str, Any], table: pd.DataFrame, **facts: Any) -> None:
    """Print ``table`` and write it as ``benchmarks/results/<name>.json``, six significant digits."""
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.max_rows", None):
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    rows = [{key: _plain(value) for key, value in row.items()} for row in table.to_dict("records")]
    write_json({"made_by": made_by, **facts, "table": rows}, RESULTS / f"{name}.json")


def _plain(value: Any) -> Any:
    """Turn numpy scalars into Python's; what is not a number becomes null."""
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def paired_difference(values: pd.Series, reference: pd.Series) -> tuple[float, float]:
    """Mean difference over perturbations and its standard error.

    Parameters
    ----------
    values, reference
        Scores indexed by perturbation; a perturbation that was scored several times counts once, by its mean.
    """
    difference = (values - reference).groupby(level=0).mean()
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def squared_error(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Squared error of Δ summed over genes, ``(perturbations,)``; squared natural-log units."""
    return ((predicted - observed) ** 2).sum(axis=1)


def require_files(parser: argparse.ArgumentParser, paths: Sequence[Path]) -> None:
    """Stop with the parser's message when one of ``paths`` is missing."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
