"""Read gene sets, which are prior knowledge to one stage and pathways to another."""

from __future__ import annotations

import gzip
from pathlib import Path

from biojepa.errors import InputError


def read_gene_sets(path: str | Path) -> dict[str, list[str]]:
    """Read gene sets in GMT format, plain or gzipped: name, description, genes, separated by tabs.

    Returns
    -------
    Name to genes, each once, in the order of the file.

    Raises
    ------
    InputError
        On a line with fewer than three fields or a name that occurs twice, naming the line, or when the
        file holds no set.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    sets: dict[str, list[str]] = {}
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, *rest = (field.strip() for field in line.split("\t"))
            genes = list(dict.fromkeys(gene for gene in rest[1:] if gene))
            if not genes:
                raise InputError(
                    f"{path} line {number}",
                    f"{len(rest) + 1} tab-separated field(s)",
                    "name, description and at least one gene",
                    "save the gene sets as GMT, separated by tabs",
                )
            if name in sets:
                raise InputError(
                    f"{path} line {number}", f"gene set {name!r} a second time", "unique names", "rename it"
                )
            sets[name] = genes
    if not sets:
        raise InputError(path, "no gene set", "at least one line", "give a GMT file")
    return sets
