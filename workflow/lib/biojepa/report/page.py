"""Put a report together: one HTML file that opens offline and asks nothing of the network."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from biojepa.report import (
    ablation,
    figures,
    figures_detail,
    figures_quality,
    figures_training,
    representation,
    strata,
    tables,
    trust,
)
from biojepa.report.decision import checks_told, decision_rows, facts, verdict_view
from biojepa.report.explorer import explorer_data
from biojepa.report.glossary import model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.methods import file_groups, key_values, methods_text, plain_value, run_tables, run_times

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
LIMIT_BYTES = 10_000_000


class Section(NamedTuple):
    """One numbered section of the page, whose content is the template ``section_{key}.html.j2``.

    Attributes
    ----------
    key
        Anchor of the section and name of its template.
    short, title
        Text in the navigation bar and in the heading.
    needs
        Name of the value handed to the template without which the section is left out.
    """

    key: str
    short: str
    title: str
    needs: str = ""


# The page in reading order, after the verdict; numbers and navigation follow from it.
SECTIONS = (
    Section("calibration", "Calibration", "Calibration: what can these metrics tell here?"),
    Section("categories", "Categories", "By category: composed of seen genes, or never seen?"),
    Section("strata", "Strata", "Where does it work?", needs="strata"),
    Section("perturbations", "Perturbations", "Each perturbation"),
    Section("effect", "Effect size", "Effect size"),
    Section("sets", "Genes and sets", "Genes, gene sets and other metrics"),
    Section("trust", "Trust", "Trust: what to expect of a perturbation nobody has measured", needs="trust"),
    Section("representation", "Representation", "Representation"),
    Section("ablation", "Ablation", "Ablation: does the JEPA add anything?", needs="ablation"),
    Section("quality", "Data", "Data and quality control"),
    Section("legacy", "Legacy", "Legacy metrics"),
    Section("leakage", "Leakage", "Leakage sentinels"),
    Section("methods", "Methods", "Methods and provenance"),
)


@cache
def environment(folder: Path = FOLDER) -> Environment:
    """Return the template environment: everything is escaped unless it is marked as safe here.

    Parameters
    ----------
    folder
        Of the page's own templates, styles and scripts; those of the report are found besides.
    """
    env = Environment(
        loader=FileSystemLoader(list(dict.fromkeys((folder, FOLDER)))),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        number=tables.format_number,
        percent=tables.format_percent,
        count=tables.format_count,
        p=tables.format_p,
        plain=plain_value,
        sentence=figures.sentence,
    )
    env.globals["asset"] = partial(asset, folder=folder)
    return env


@cache
def asset(name: str, folder: Path = FOLDER) -> Markup:
    """Return a style sheet or script of a page or of the report, to be written into the page as it is."""
    if name == "plotly.js":
        text = get_plotlyjs()
    else:
        path = folder / name
        text = (path if path.exists() else FOLDER / name).read_text(encoding="utf-8")
    # Inside a script, <\/script is the same string literal and does not end the element.
    return Markup(text.replace("</script", "<\\/script"))


def embedded_json(content: Any) -> Markup:
    r"""Return JSON that is safe inside a script element: no ``<``, ``>`` or ``&`` remains.

    A gene called ``</script>`` becomes ``\u003c/script\u003e``, which JSON reads back as it was.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def build_report(inputs: ReportInputs) -> str:
    """Return the report of one dataset and split as HTML.

    The page holds its style, scripts and data; it refers to no address but, relatively, to the
    tables beside it. Equal inputs give equal bytes.
    """
    drawings = _drawings(inputs)
    compared = ablation.ablation_view(inputs)
    if compared:
        drawings["ablation"] = [compared["figure"]]
    embeddings = representation.representation_view(inputs)
    if embeddings:
        drawings["representation"] = embeddings["figures"]
    stratified, expected = strata.strata_view(inputs), trust.trust_view(inputs)
    drawings["strata"] = [stratified["figure"]] if stratified else []
    drawings["trust"] = expected["figures"] if expected else []
    drawn = [figure for group in drawings.values() for figure in group]
    data = {
        "figures": figure_data(drawn),
        "explorer": explorer_data(inputs),
    }
    shown: dict[str, Any] = {
        "inputs": inputs,
        "level": tables.format_level(inputs.confidence),
        "facts": facts(inputs),
        "verdict": verdict_view(inputs),
        "lead": model_text(inputs.lead_model, inputs.lead_model),
        "checks": checks_told(inputs.sentinels),
        "decision": decision_rows(inputs),
        "headline": tables.score_table(inputs, inputs.headline_metrics),
        "category_tables": tables.category_tables(inputs),
        "other": tables.score_table(inputs, tables.other_metrics(inputs)),
        "legacy": tables.score_table(inputs, tables.legacy_metrics(inputs)),
        "figures": drawings,
        "ablation": compared,
        "embeddings": embeddings,
        "strata": stratified,
        "trust": expected,
        "data": embedded_json(data),
        "qc_columns": list(inputs.qc.columns),
        "qc_rows": table_rows(inputs.qc),
        "flags": count_flags(inputs.perturbations),
        "coverage": tables.coverage_of_sources(inputs.coverage),
        "curve_key": figures_training.curve_key(inputs),
        "methods": methods_text(inputs),
        "run_times": run_times(inputs),
        "runs": run_tables(inputs),
        "file_groups": file_groups(inputs.downloads),
        "provenance": key_values(inputs.provenance),
        "settings": json.dumps(inputs.settings, indent=2, sort_keys=True, default=str, ensure_ascii=False),
    }
    sections = [section for section in SECTIONS if not section.needs or shown[section.needs]]
    page = environment().get_template("template.html.j2").render(sections=sections, **shown)
    size = len(page.encode())
    if size > LIMIT_BYTES:
        logger.warning("the report of %s takes %.1f MB: browsers may be slow", inputs.dataset, size / 1e6)
    return page


def figure_data(drawn: Iterable[figures.Figure]) -> dict[str, Any]:
    """Return what the page's script draws, by the key of each figure."""
    return {
        figure.key: {
            "options": [[label, spec] for label, spec in figure.options.items()],
            "height": figure.height,
        }
        for figure in drawn
    }


def _drawings(inputs: ReportInputs) -> dict[str, list[figures.Figure]]:
    by_category = figures.category_figure(inputs)
    return {
        "calibration": figures.calibration_figures(inputs),
        "categories": [by_category] if by_category else [],
        "effect": figures_detail.effect_figures(inputs),
        "gene_sets": figures_detail.gene_set_figures(inputs),
        "umap": figures_training.umap_figures(inputs),
        "curves": figures_training.curve_figures(inputs),
        "quality": figures_quality.quality_figures(inputs),
    }


def table_rows(table: pd.DataFrame) -> list[list[str]]:
    """Return the rows of a table as text: counts grouped, missing values as a dash."""
    columns = []
    for column in table.columns:
        values = table[column]
        if column.startswith("cells_"):
            columns.append([tables.format_count(value) for value in values])
        else:
            columns.append([plain_value(value) for value in values])
    return [list(row) for row in zip(*columns, strict=True)] if columns else []


def count_flags(perturbations: pd.DataFrame) -> list[tuple[str, int]]:
    """Count the flags of the perturbation table, several of which may share a cell."""
    counts: dict[str, int] = {}
    for cell in perturbations["flag"].dropna().astype(str):
        for flag in filter(None, (part.strip() for part in cell.replace(",", ";").split(";"))):
            counts[flag] = counts.get(flag, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
