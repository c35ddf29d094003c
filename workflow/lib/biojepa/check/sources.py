"""Which prior sources know the genes that a screen perturbs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from biojepa.check.problems import Problems
from biojepa.check.screen import LISTED, Screen
from biojepa.config import Config
from biojepa.errors import InputError
from biojepa.gene_naming import naming_mismatch
from biojepa.gene_sets import read_gene_sets
from biojepa.labels import genes_of
from biojepa.prediction_requests import read_requests
from biojepa.prior_names import COEXPRESSION, RESPONSES, TRAINING_CELLS
from biojepa.priors import PriorSource, read_sources, require_coverage


def look_at_sources(
    config: Config, dataset: str, screens: Mapping[str, Screen], problems: Problems
) -> dict[str, Any]:
    """Count the perturbed genes that each prior source of a dataset knows.

    Parameters
    ----------
    config, dataset
        The checked config, and a row of its table.
    screens
        Every dataset looked at; other screens whose responses are a source know the genes that they perturb
        alone.
    problems
        Gets files that cannot be read, and sources that know none of the genes.

    Returns
    -------
    Where perturbations are to be predicted, ``asked`` and those of their genes that are ``asked_unknown``;
    ``genes`` perturbed, ``measured`` of them, ``sources`` (name, kind, genes that it ``covers``, ``hint`` why
    few), genes that are ``uncovered``, what is ``pending`` (not there yet), and what is ``missing``.
    """
    row, genes = config.source(dataset), screens[dataset].perturbed_genes
    settings = config.settings(dataset, "pair")
    sources: list[PriorSource] = []
    pending: list[str] = []
    missing: list[str] = []
    lost = {path for _, path in row.missing_files()}
    kinds = {"networks": row.networks, "gene_sets": row.gene_sets, "gene_tables": row.gene_tables}
    for kind, paths in kinds.items():
        for path in paths:
            if not Path(path).exists():
                # Those that should be there are problems of the config.
                (missing if path in lost else pending).append(path)
                continue
            with problems.caught(dataset, path):
                sources += read_sources(**{kind: [path]}, restart=settings["restart"])
    covered: dict[str, set[str]] = {}
    facts = []
    for source in sources:
        covered[source.name] = set(genes) & source.known
        facts.append(_facts(source.name, source.kind, genes, source.known))
        if genes:
            with problems.caught(dataset, str(source.where)):
                require_coverage([source], genes)
    for other in row.responses:
        if other not in screens or screens[other].obs is None:
            pending.append(f"responses of {other}")
            continue
        covered[other] = set(genes) & screens[other].singles
        facts.append(_facts(f"{RESPONSES}{other}", "responses", genes, screens[other].singles))
        if genes and not covered[other]:
            problems.add(
                f"column responses: {other} perturbs none of the {len(genes)} perturbed genes alone; "
                "expected some. Fix: take it out of the column, or correct the spelling of genes",
                dataset,
            )
    measured = set(genes) & set(screens[dataset].measured)
    if settings["coexpression"] and screens[dataset].measured:
        covered[COEXPRESSION] = measured
        facts.append(_facts(COEXPRESSION, TRAINING_CELLS, genes, screens[dataset].measured))
    for path in row.pathways:
        if Path(path).exists():
            with problems.caught(dataset, path):
                read_gene_sets(path)
    known = set().union(*covered.values())
    uncovered = [gene for gene in genes if gene not in known]
    found: dict[str, Any] = {
        "genes": len(genes),
        "sources": facts,
        "uncovered": len(uncovered),
        "uncovered_first": uncovered[:LISTED],
        "pending": pending,
        "missing": missing,
    }
    asked = _requests(config)
    if asked is not None:
        wanted = {gene for label in asked for gene in genes_of(label)}
        others = [screens[other].singles for other in row.responses if other in screens]
        everyone = known.union(genes, *(source.known for source in sources), *others)
        found["asked"], found["asked_unknown"] = len(asked), sorted(wanted - everyone)
    if screens[dataset].measured:
        found["measured"] = len(measured)
        found["measured_hint"] = naming_mismatch(genes, screens[dataset].measured)
    return found


def _requests(config: Config) -> list[str] | None:
    """Return the perturbations that the config lists to predict; None for none or ``all``."""
    if config.predict is None:
        return None
    try:
        asked = read_requests(config.predict)
    except InputError:  # which is a problem of the config already
        return None
    return None if isinstance(asked, str) else asked


def _facts(name: str, kind: str, genes: list[str], known: Collection[str]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "covers": len(set(genes) & set(known)),
        "hint": naming_mismatch(genes, known),
    }
