"""Tell why the gene names of two files do not meet: another species, or another kind of identifier."""

from __future__ import annotations

import re
from collections.abc import Collection

ENSEMBL = re.compile(r"ENS[A-Z]*G\d+")
# Of mouse and rat: Trp53, H2-K1. Of man: TP53, HLA-A, C1orf43.
RODENT = re.compile(r"[A-Z][a-z0-9][A-Za-z0-9.-]*[a-z][A-Za-z0-9.-]*|[A-Z][a-z]+\d*")
HUMAN = re.compile(r"[A-Z][A-Z0-9.-]*(orf\d+[A-Z0-9]*)?")
# Share of one side that the other has to know, so that nothing is said of the rest.
ENOUGH = 0.5
# Share of the names of one side that have a style, so that the side has it.
MAJORITY = 0.6


def naming_style(genes: Collection[str]) -> str:
    """Return how most genes are called: ``Ensembl ids``, ``mouse symbols``, ``human symbols``, or nothing."""
    styles = {"Ensembl ids": ENSEMBL, "mouse symbols": RODENT, "human symbols": HUMAN}
    for style, pattern in styles.items():
        if genes and sum(bool(pattern.fullmatch(gene)) for gene in genes) >= MAJORITY * len(genes):
            return style
    return ""


def naming_mismatch(genes: Collection[str], known: Collection[str]) -> str:
    """Say why few of ``genes`` are among ``known``.

    Returns
    -------
    str
        Half a sentence, such as ``mouse symbols (Trp53) against human symbols (TP53)``; nothing where half of
        the genes are known, or where neither style nor case tells the names apart.
    """
    genes, known = set(genes), set(known)
    if not genes or not known or len(genes & known) >= ENOUGH * len(genes):
        return ""
    ours, theirs = naming_style(genes), naming_style(known)
    upper = {gene.upper(): gene for gene in sorted(known)}
    pairs = [(gene, upper[gene.upper()]) for gene in sorted(genes - known) if gene.upper() in upper]
    if not (ours and theirs) or ours == theirs:
        # A few such pairs beside many genes that are known say nothing of the file.
        if len(pairs) <= len(genes & known):
            return ""
        first, second = pairs[0]
        return f"differs only in upper and lower case: {first} against {second}; of another species?"
    first, second = pairs[0] if pairs else (min(genes - known), min(known))
    return f"{ours} ({first}) against {theirs} ({second})"
