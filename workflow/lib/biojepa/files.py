"""Write files so that a reader sees the whole file or none, and identify them by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it to ``path`` when the block succeeds.

    The temporary file is removed when the block raises, so that nothing half-written is left.
    It keeps the suffix of ``path``, because writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tsv(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table without its index; floats with 10 significant digits, missing as empty."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, sep="\t", index=False, float_format="%.10g", lineterminator="\n")


def read_tsv(path: str | Path, **options: Any) -> pd.DataFrame:
    """Read a table of this pipeline: only an empty field is missing, so a gene may be called NA."""
    return pd.read_csv(path, sep="\t", keep_default_na=False, na_values=[""], **options)


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes; NaN is refused, not JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )


def write_text(content: str, path: str | Path) -> None:
    """Write text as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def sha256_of(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file, read in blocks of 1 MiB."""
    digest = hashlib.new(algorithm)
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
