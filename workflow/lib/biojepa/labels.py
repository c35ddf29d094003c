"""Perturbation labels: one spelling for the same perturbation, whatever the file calls it.

The config is checked with this before any job, so it imports neither NumPy nor pandas.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence

from biojepa.contracts import ALL_CONTEXTS, CONTEXT_SEPARATOR, CONTROL, GENE_SEPARATOR
from biojepa.errors import InputError

# Names that published screens give to unperturbed cells, or with which they pad a single
# perturbation (``KLF1+ctrl``). Compared without regard to case.
CONTROL_SYNONYMS = frozenset(
    {
        "ctrl",
        "control",
        "non-targeting",
        "non_targeting",
        "nontargeting",
        "nt",
        "ntc",
        "negctrl",
        "neg_ctrl",
        "neg_control",
    }
)
# What files write where a label or a guide is missing, ``NA`` of R among them; in whatever case.
MISSING_LABELS = frozenset(
    {"", "na", "n/a", "<na>", "#n/a", "nan", "none", "null", "unassigned", "unknown", "ambiguous", "*"}
)
CONTROL_LABEL_SEPARATOR = ";"


def control_names(control_label: str) -> tuple[str, ...]:
    """Split a ``control_label`` setting, which may name several labels joined by ``;``."""
    names = (name.strip() for name in control_label.split(CONTROL_LABEL_SEPARATOR))
    return tuple(name for name in names if name)


def is_control_name(name: str, controls: Sequence[str] = ()) -> bool:
    """Tell whether a name stands for "not perturbed": one of ``controls`` or a known synonym."""
    return name in controls or name.casefold() in CONTROL_SYNONYMS


def is_missing(raw: object) -> bool:
    """Tell whether a field of a table names nothing: it is empty, or says so in a usual way."""
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        return True
    return str(raw).strip().casefold() in MISSING_LABELS


def normalize_label(
    raw: object, separator: str = GENE_SEPARATOR, controls: Sequence[str] = (), pattern: str = ""
) -> str | None:
    """Return the label of this pipeline for a label of a file.

    Parameters
    ----------
    raw
        Label as the file spells it. Numbers are taken as text.
    separator
        What joins the genes of a combination in the file.
    controls
        Labels that mean control. When none is given, the synonyms in ``CONTROL_SYNONYMS`` do.
    pattern
        Regular expression whose matches are removed, from the whole label and from each gene.

    Returns
    -------
    str or None
        Genes in sorted order joined by ``+``, each once, control padding dropped; ``control``;
        or None when the label is missing, or names a control other than ``controls``.

    Raises
    ------
    InputError
        When a gene holds what joins the genes of a combination here, or a perturbation and its context.
    """
    if raw is None or (isinstance(raw, float) and math.isnan(raw)):
        return None
    whole = str(raw).strip()
    stripped = re.sub(pattern, "", whole).strip() if pattern else whole
    if whole in controls or stripped in controls:
        return CONTROL
    if is_missing(stripped):
        return None
    if stripped.casefold() in CONTROL_SYNONYMS:
        # Another kind of control than the one that was named: neither a gene nor, unasked, a control.
        return None if controls else CONTROL
    parts = [part.strip() for part in stripped.split(separator)] if separator else [stripped]
    if pattern:
        parts = [re.sub(pattern, "", part).strip() for part in parts]
    genes = {part for part in parts if part and not is_control_name(part, controls)}
    joined = [gene for gene in sorted(genes) if GENE_SEPARATOR in gene]
    if joined:
        raise InputError(
            f"perturbation label {whole!r}",
            f"{GENE_SEPARATOR!r} inside the gene name {joined[0]!r} (separator is {separator!r})",
            f"gene names without {GENE_SEPARATOR!r}, which joins the genes of a combination",
            f"set `separator` to {GENE_SEPARATOR!r}, or strip the extra text with `label_pattern`",
        )
    placed = [gene for gene in sorted(genes) if CONTEXT_SEPARATOR in gene]
    if placed:
        raise InputError(
            f"perturbation label {whole!r}",
            f"{CONTEXT_SEPARATOR!r} inside the gene name {placed[0]!r}",
            f"gene names without {CONTEXT_SEPARATOR!r}, which joins a perturbation and its context",
            "strip the extra text with `label_pattern`",
        )
    return GENE_SEPARATOR.join(sorted(genes)) if genes else CONTROL


def spell_label(raw: str, known: Container[str] = ()) -> str:
    """Spell a label as ``split.tsv`` does: genes sorted, control padding dropped, with or without a context.

    Parameters
    ----------
    raw
        Label as somebody else wrote it.
    known
        Labels that stand as they are.

    Returns
    -------
    str
        As it is where it cannot be a label; whoever looks it up says so.
    """
    if raw in known:
        return raw
    perturbation = perturbation_of(raw)
    try:
        label = normalize_label(perturbation) or perturbation
    except InputError:
        return raw
    return label + raw[len(perturbation) :]


def genes_of(label: str) -> list[str]:
    """Return the perturbed genes of a normalized label, with or without a context; none for the control."""
    perturbation = perturbation_of(label)
    return [] if perturbation == CONTROL else perturbation.split(GENE_SEPARATOR)


def is_combination(label: str) -> bool:
    """Tell whether a normalized label perturbs more than one gene."""
    return GENE_SEPARATOR in perturbation_of(label)


def perturbation_of(label: str) -> str:
    """Return a label without its context: ``A+B`` of ``A+B @ K562`` and of ``A+B``."""
    return label.partition(CONTEXT_SEPARATOR)[0]


def context_of(label: str) -> str:
    """Return the context that a label names, ``all`` where it names none."""
    return label.partition(CONTEXT_SEPARATOR)[2] or ALL_CONTEXTS


def in_context(label: str, context: str) -> str:
    """Write a label in a context: ``A+B @ K562``."""
    return f"{label}{CONTEXT_SEPARATOR}{context}"
