"""Read which perturbations the config asks to predict, and refuse what is no perturbation.

The config is checked with this before any job, so it imports neither torch nor anndata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from biojepa.contracts import GENE_SEPARATOR
from biojepa.errors import InputError
from biojepa.labels import is_control_name

ALL = "all"
"""Ask for every gene that at least one prior source covers."""


def request_file(predict: Sequence[str] | str | None) -> str | None:
    """Return the path of the file that the key ``predict`` names, or None where it names none."""
    return predict if isinstance(predict, str) and predict != ALL else None


def requests_from(
    predict: Sequence[str] | str | None, files: str | Sequence[str]
) -> Sequence[str] | str | None:
    """Return what to read: the file where a job finds it, if the key ``predict`` names one.

    In a workflow that uses this one as a module with a prefix, it is elsewhere than the key says.
    """
    if request_file(predict) is None:
        return predict
    return files if isinstance(files, str) else files[0]


def read_requests(predict: Sequence[str] | str | None) -> list[str] | str:
    """Read the key ``predict`` of the config.

    Parameters
    ----------
    predict
        Perturbations, ``GENE`` or ``A+B``; the path of a text file with one on each line, where empty
        lines and what follows ``#`` are skipped; ``all``; or None.

    Returns
    -------
    Perturbations in their order, each once, genes sorted; or ``ALL``.

    Raises
    ------
    InputError
        When the file cannot be read, or an entry is no perturbation; all such entries in one message.
    """
    if predict is None:
        return []
    if predict == ALL:
        return ALL
    path = request_file(predict)
    if path is None:
        return parse_requests(predict, "config, key predict")
    if not Path(path).is_file():
        raise InputError(
            "config, key predict",
            f"no file {path}",
            f"a list of perturbations, the path of a text file, or {ALL}",
            f"correct the path, or write a list: predict: [{path}]",
        )
    try:
        # Some editors put a byte order mark in front.
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            path, f"text in another encoding ({error.reason})", "UTF-8", "save the file as UTF-8"
        ) from None
    entries = [line.split("#", 1)[0].strip() for line in lines]
    return parse_requests([entry for entry in entries if entry], path)


def parse_requests(entries: Iterable[str], where: str | Path) -> list[str]:
    """Bring perturbations into the spelling of this pipeline.

    Raises
    ------
    InputError
        When there is none, or naming every entry that is no perturbation and what is wrong with it.
    """
    problems, requests = [], []
    for entry in entries:
        genes = [gene.strip() for gene in entry.split(GENE_SEPARATOR)]
        if not all(genes):
            problems.append(f"{entry!r} lacks a gene")
        elif ALL in genes:
            problems.append(f"{entry!r} is no gene (for all that a source covers, write predict: {ALL})")
        elif any(re.search(r"[\s,;|]", gene) for gene in genes):
            problems.append(f"{entry!r} holds a blank, comma, semicolon or bar")
        elif any(is_control_name(gene) for gene in genes):
            problems.append(f"{entry!r} names a control")
        elif len(set(genes)) < len(genes):
            problems.append(f"{entry!r} names a gene twice")
        else:
            requests.append(GENE_SEPARATOR.join(sorted(genes)))
    if problems or not requests:
        raise InputError(
            where,
            "; ".join(problems) or "no perturbation",
            f"one perturbation per entry: GENE, or genes joined by {GENE_SEPARATOR!r}",
            "correct or remove these entries",
        )
    return list(dict.fromkeys(requests))
