"""Put a report together: one HTML file that opens offline and asks nothing of the network."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from biojepa import contracts
from biojepa.evaluation.verdict import BETTER, CANNOT_TELL, NOT_EVALUATED, SAME, WORSE
from biojepa.report import ablation, figures, figures_detail, figures_quality, figures_training, tables
from biojepa.report.explorer import explorer_data
from biojepa.report.glossary import model_text
from biojepa.report.inputs import ReportInputs

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
LIMIT_BYTES = 10_000_000


@cache
def environment() -> Environment:
    """Return the template environment: everything is escaped unless it is marked as safe here."""
    env = Environment(
        loader=FileSystemLoader(FOLDER),
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
    )
    env.globals["asset"] = asset
    return env


@cache
def asset(name: str) -> Markup:
    """Return a style sheet or script of this package, to be written into the page as it is."""
    text = get_plotlyjs() if name == "plotly.js" else (FOLDER / name).read_text(encoding="utf-8")
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


def plain_value(value: Any) -> str:
    """Return a value of a provenance record as text: numbers as they are, nested content as JSON."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return tables.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return str(value)


def build_report(inputs: ReportInputs) -> str:
    """Return the report of one dataset and split as HTML.

    The page holds its style, scripts and data; it refers to no address but, relatively, to the
    tables beside it. Equal inputs give equal bytes.
    """
    sections = _sections(inputs)
    compared = ablation.ablation_view(inputs)
    if compared:
        sections["ablation"] = [compared["figure"]]
    drawn = [figure for group in sections.values() for figure in group]
    data = {
        "figures": {
            figure.key: {
                "options": [[label, spec] for label, spec in figure.options.items()],
                "height": figure.height,
            }
            for figure in drawn
        },
        "explorer": explorer_data(inputs),
    }
    page = (
        environment()
        .get_template("template.html.j2")
        .render(
            inputs=inputs,
            facts=_facts(inputs),
            verdict=_verdict(inputs),
            lead=model_text(inputs.lead_model, inputs.lead_model),
            headline=tables.score_table(inputs, inputs.headline_metrics),
            category_tables=tables.category_tables(inputs),
            other=tables.score_table(inputs, tables.other_metrics(inputs)),
            legacy=tables.score_table(inputs, tables.legacy_metrics(inputs)),
            figures=sections,
            ablation=compared,
            data=embedded_json(data),
            qc_columns=list(inputs.qc.columns),
            qc_rows=_records(inputs.qc),
            flags=_flags(inputs.perturbations),
            coverage=tables.coverage_of_sources(inputs.coverage),
            curve_key=figures_training.curve_key(inputs),
            runs=_run_table(inputs.train_metrics),
            provenance=_key_values(inputs.provenance),
            settings=json.dumps(inputs.settings, indent=2, sort_keys=True, default=str, ensure_ascii=False),
        )
    )
    size = len(page.encode())
    if size > LIMIT_BYTES:
        logger.warning("the report of %s takes %.1f MB: browsers may be slow", inputs.dataset, size / 1e6)
    return page


def _sections(inputs: ReportInputs) -> dict[str, list[figures.Figure]]:
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


def _facts(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Return the few counts that the head of the page states."""
    tested = inputs.metrics.loc[inputs.metrics["perturbation"] != contracts.WHOLE_MODEL, "perturbation"]
    seeds = inputs.metrics.loc[inputs.metrics["model"] == inputs.lead_model, "seed"]
    cells = inputs.qc["cells_after"].dropna()
    counts = [
        ("held-out perturbation", tested.nunique()),
        ("fold", len(inputs.splits) or inputs.metrics["fold"].nunique()),
        ("seed", max(seeds.nunique(), 1)),
        ("model or control", len(inputs.models)),
    ]
    facts = [(name if count == 1 else _plural(name), tables.format_count(count)) for name, count in counts]
    return [
        *facts,
        ("cells after quality control", tables.format_count(cells.iloc[-1] if len(cells) else None)),
    ]


def _plural(name: str) -> str:
    return "models and controls" if name == "model or control" else f"{name}s"


# Tone and heading by the outcome that the verdict's rules gave.
OUTCOMES = {
    BETTER: ("good", "Better than the best baseline"),
    SAME: ("even", "Indistinguishable from the best baseline"),
    WORSE: ("bad", "Worse than the best baseline"),
    CANNOT_TELL: ("open", "This dataset cannot tell"),
    NOT_EVALUATED: ("open", "Not evaluated"),
}


def _latent_share(inputs: ReportInputs) -> str:
    """Say in how many trainings the latent predictor adds to the linear branch; empty without a gate.

    Without this sentence a model whose gate is shut looks like a learned one that ties with the ridge.
    """
    runs = [
        record
        for name, record in inputs.train_metrics.items()
        if name.split(" ")[0] == inputs.main_model and record.get("linear_weights")
    ]
    if not runs:
        return ""
    open_gates = sum(record["latent_weight"] > 0 for record in runs)
    shut = len(runs) - open_gates
    text = f"Validation perturbations opened the gate of the latent predictor in {open_gates} of {len(runs)} "
    text += "training." if len(runs) == 1 else "trainings."
    if shut:
        text += (
            " Where it is shut, the predictions are those of the linear branch, half of which looks at the "
            "embedding."
        )
    return text


def _verdict(inputs: ReportInputs) -> dict[str, Any]:
    """Return the verdict as the page shows it; a file without a sentence says so."""
    verdict = inputs.verdict
    tone, label = OUTCOMES.get(str(verdict.get("outcome")), ("open", ""))
    details = [item for item in verdict.get("details", []) if item.get("text")]
    return {
        "sentence": verdict.get("sentence") or "No verdict was recorded for this evaluation.",
        "details": [item for item in details if item.get("scope") != contracts.ALL_CATEGORIES],
        "tone": tone,
        "label": label,
        "latent": _latent_share(inputs),
        "unusable": [name for name in inputs.headline_metrics if not inputs.usable(name)],
        "rule": verdict.get("rule", ""),
    }


def _records(table: pd.DataFrame) -> list[list[str]]:
    """Return the rows of a table as text: counts grouped, missing values as a dash."""
    columns = []
    for column in table.columns:
        values = table[column]
        if column.startswith("cells_"):
            columns.append([tables.format_count(value) for value in values])
        else:
            columns.append([plain_value(value) for value in values])
    return [list(row) for row in zip(*columns, strict=True)] if columns else []


def _flags(perturbations: pd.DataFrame) -> list[tuple[str, int]]:
    """Count the flags of the perturbation table, several of which may share a cell."""
    counts: dict[str, int] = {}
    for cell in perturbations["flag"].dropna().astype(str):
        for flag in filter(None, (part.strip() for part in cell.replace(",", ";").split(";"))):
            counts[flag] = counts.get(flag, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _run_table(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Lay the numbers of the training runs side by side, one row per number.

    Versions and settings are the same for all runs and stand under provenance and configuration.
    """
    flat = {
        run: dict(_key_values({k: v for k, v in numbers.items() if k not in ("packages", "settings")}))
        for run, numbers in runs.items()
    }
    keys = list(dict.fromkeys(key for numbers in flat.values() for key in numbers))
    rows = [
        (key.replace("_", " "), [numbers.get(key, tables.MISSING) for numbers in flat.values()])
        for key in keys
    ]
    return {"runs": list(flat), "rows": rows}


def _key_values(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested records to ``section · key`` and text, in the order in which they were written."""
    pairs: list[tuple[str, str]] = []
    for key, value in record.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(value, dict):
            pairs += _key_values(value, name)
        else:
            pairs.append((name, plain_value(value)))
    return pairs
