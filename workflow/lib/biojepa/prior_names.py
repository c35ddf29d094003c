"""Name the sources of prior knowledge after their files, and refuse names that something else has.

The config is checked with this before any job, so it imports neither numpy nor scipy.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from biojepa.errors import InputError

SUFFIXES = (".gz", ".gmt", ".tsv", ".csv", ".txt")
COEXPRESSION = "coexpression"
# What a source was made from. The last two come from cells.
KINDS = NETWORK, GENE_SETS, GENE_TABLE, OTHER_SCREEN_RESPONSES, TRAINING_CELLS = (
    "network",
    "gene sets",
    "gene table",
    "responses in another screen",
    "co-expression in training cells",
)
RESPONSES = "responses_"
# Columns of coverage.tsv beside those of the sources.
COVERAGE_COLUMNS = ("gene", "n_sources", "consequence")


def source_name(path: str | Path) -> str:
    """Return the name of a file without the suffixes of its format: ``c2.cp.kegg.gmt.gz``, ``c2.cp.kegg``."""
    name = Path(path).name
    while (suffix := next((end for end in SUFFIXES if name.endswith(end)), None)) is not None:
        name = name.removesuffix(suffix)
    return name


def require_file_names(paths: Iterable[str | Path]) -> None:
    """Stop when a file cannot give its source a name of its own.

    Raises
    ------
    InputError
        Naming the first file whose name is empty, is taken by this pipeline, or is that of an earlier one.
    """
    seen: dict[str, str | Path] = {}
    for path in paths:
        name = source_name(path)
        if not name:
            found, expected = "a file name that is nothing but a suffix", "a name before the suffix"
        elif name in (*COVERAGE_COLUMNS, COEXPRESSION) or name.startswith(RESPONSES):
            found = f"a source called {name!r}, a name that this pipeline gives to something else"
            taken = ", ".join((*COVERAGE_COLUMNS, COEXPRESSION))
            expected = f"none of {taken} or {RESPONSES}…"
        elif name in seen:
            found = f"a second source called {name!r}, after {seen[name]}"
            expected = f"files whose names differ without {', '.join(SUFFIXES)}"
        else:
            seen[name] = path
            continue
        raise InputError(path, found, expected, "rename the file, or name it once")
