"""Put the page of quality control together: one HTML file that opens offline, in the look of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from biojepa.guides.settings import DOMINANCE, MIXTURE
from biojepa.qc_report import figures_cells, figures_perturbations, summary
from biojepa.qc_report.inputs import RESPONDING_SHARE, QcInputs
from biojepa.report.figures import number
from biojepa.report.figures_quality import funnel_figure, split_values
from biojepa.report.methods import key_values
from biojepa.report.page import count_flags, embedded_json, environment, figure_data, table_rows
from biojepa.report.tables import MISSING, format_count, format_number, format_percent

FOLDER = Path(__file__).parent
# Rows of the table; of a larger screen, those with the strongest effects. All are in perturbations.tsv.
MAX_ROWS = 3_000


def build_qc_report(inputs: QcInputs) -> str:
    """Return the page of one dataset as HTML; equal inputs give equal bytes."""
    funnel = funnel_figure(inputs.qc)
    cell_map = figures_perturbations.map_figure(inputs)
    drawings = {
        "filters": [funnel] if funnel else [],
        "cells": figures_cells.distribution_figures(inputs),
        "guides": figures_cells.guide_figures(inputs),
        "perturbations": figures_perturbations.perturbation_figures(inputs),
        "effects": figures_perturbations.effect_figures(inputs),
        "map": [cell_map] if cell_map else [],
    }
    drawn = [figure for group in drawings.values() for figure in group]
    found = summary.warnings(inputs)
    return environment(FOLDER).get_template("qc.html.j2").render(
        inputs=inputs,
        facts=summary.facts(inputs),
        warnings=found,
        heading=f"{summary.plural(len(found), 'thing')} to look at" if found else "Nothing stands out",
        sentences=summary.sentences(inputs),
        figures=drawings,
        flags=count_flags(inputs.perturbations),
        cell_flags=[(name, format_count(n)) for name, n in inputs.cells.flags.items()],
        phases=[(name, format_count(n)) for name, n in inputs.cells.phases.items()],
        qc_columns=list(inputs.qc.columns),
        qc_rows=table_rows(inputs.qc),
        shown=min(len(inputs.perturbations), MAX_ROWS),
        settings=json.dumps(settings_used(inputs), indent=2, sort_keys=True, default=str, ensure_ascii=False),
        provenance=key_values(dict(inputs.provenance)),
        data=embedded_json({"figures": figure_data(drawn), "rows": perturbation_rows(inputs.perturbations)}),
    )  # fmt: skip


def perturbation_rows(table: pd.DataFrame) -> dict[str, Any]:
    """Return the table of perturbations column by column, strongest effect first.

    Returns
    -------
    dict
        ``columns``: ``key``, ``title``, ``kind`` (``text``, ``count``, ``number``, ``p``, ``percent``),
        ``values`` (what is sorted by, None where missing) and, where the text is not made of the value,
        ``shown``; ``flags``: every flag that occurs; ``total``: rows of the whole table.
    """
    rows = table.sort_values(["effect_size", "perturbation"], ascending=[False, True], kind="stable")[
        :MAX_ROWS
    ]
    flags = rows["flag"].fillna("").astype(str).str.replace("_", " ")
    columns = [
        _column("perturbation", "Perturbation", "text", rows["perturbation"].astype(str).tolist()),
        _column("n_cells", "Cells", "count", _numbers(rows["n_cells"])),
        # No guide at all is a screen that came with labels.
        _column("n_guides", "Guides", "count", _numbers(rows["n_guides"].where(rows["n_guides"] > 0))),
        _targets(rows, "on_target_log2fc", "Target, log2 FC", lambda value: format_number(value, 2)),
        _column("effect_size", "Effect size", "number", _numbers(rows["effect_size"])),
        _column("effect_q", "q", "p", _numbers(rows["effect_q"])),
        _column("n_deg", "Changed genes", "count", _numbers(rows["n_deg"])),
        _top_genes(rows),
    ]
    if rows[RESPONDING_SHARE].notna().any():
        columns.append(_column(RESPONDING_SHARE, "Responding", "percent", _numbers(rows[RESPONDING_SHARE])))
    columns.append(_column("flag", "Flags", "text", flags.str.replace(";", ", ").tolist()))
    return {
        "columns": columns,
        "flags": [name.replace("_", " ") for name, _ in count_flags(rows)],
        "total": len(table),
    }


def settings_used(inputs: QcInputs) -> dict[str, Any]:
    """Return the settings without those of guide assignment that its rule does not look at."""
    settings, rule = dict(inputs.settings), inputs.assignment
    if rule is None:
        return settings
    del settings["guide_assignment"]
    if len(inputs.guide_calls):
        used: dict[str, Any] = {"method": rule.method, "min_umis": rule.min_umis, "min_share": rule.share}
        if rule.method != DOMINANCE:
            used["max_guides"] = rule.max_guides
        if rule.method == MIXTURE:
            used["min_posterior"] = rule.min_posterior
        settings["guide_assignment"] = used
    return settings


def _numbers(values: pd.Series) -> list[float | None]:
    return [number(value, 4) for value in values]


def _column(key: str, title: str, kind: str, values: list[Any]) -> dict[str, Any]:
    return {"key": key, "title": title, "kind": kind, "values": values}


def _top_genes(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the gene that changed most and its share of the squared change, by which the column sorts."""
    shown = [
        MISSING if pd.isna(share) else f"{gene} {format_percent(share)}"
        for gene, share in zip(rows["top_gene"], rows["top_gene_share"], strict=True)
    ]
    values = _numbers(rows["top_gene_share"])
    return {**_column("top_gene_share", "Most changed", "percent", values), "shown": shown}


def _targets(rows: pd.DataFrame, key: str, title: str, told: Any) -> dict[str, Any]:
    """Return a column with a value for each gene of a perturbation; it sorts by the largest change."""
    parts = [split_values(value) for value in rows[key]]
    known = [[value for value in values if not pd.isna(value)] for values in parts]
    values = [number(max(some, key=abs), 4) if some else None for some in known]
    shown = ["; ".join(map(told, some)) if any(not pd.isna(v) for v in some) else MISSING for some in parts]
    return {**_column(key, title, "number", values), "shown": shown}
