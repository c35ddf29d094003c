"""Figures of the screen: cells lost, cells per perturbation, on-target and overall effects."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from biojepa import contracts
from biojepa.labels import perturbation_of
from biojepa.report.figures import MAX_POINTS, Caption, Figure, escape, evenly, from_zero, line, numbers
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import format_count, format_percent

# Letters of a threshold beside its bar.
MAX_RULE = 40
# A target has moved from this p and this change on; smaller p than the last are drawn there.
MOVED_P, MOVED_LOG2FC, SMALLEST_P = 0.05, 0.25, 1e-50
# Targets named in their figure, and the room of a name as shares of the axes.
NAMED_TARGETS = 5
NAME_WIDTH, NAME_HEIGHT = 0.09, 0.07


def quality_figures(inputs: ReportInputs) -> list[Figure]:
    """Draw the cells lost per filter, cells per perturbation, on-target effects and effect sizes."""
    figures = [funnel_figure(inputs.qc)]
    table = inputs.perturbations
    if len(table):
        figures += [_cells_figure(inputs), on_target_figure(table), effect_figure(table)]
    return [figure for figure in figures if figure is not None]


def funnel_figure(qc: pd.DataFrame) -> Figure | None:
    """Draw the cells left after each filter and those that it removed, as in ``qc.tsv``."""
    rows = qc.dropna(subset=["cells_after"])
    if rows.empty:
        return None
    names = ["read", *rows["filter"].astype(str)]
    after = [rows["cells_before"].iloc[0], *rows["cells_after"]]
    removed = [0, *rows["cells_removed"]]
    labels = [escape(name.replace("_", " ")) for name in names]
    rules = ["", *rows["threshold"].fillna("").astype(str)]
    labels = [
        f'{label}<br><span style="font-size:10px">{escape(_short(rule))}</span>' if rule else label
        for label, rule in zip(labels, rules, strict=True)
    ]
    spec = {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "x": numbers(after, 9),
                "y": labels,
                "name": "kept",
                "marker": {"color": "@baseline"},
                "customdata": [format_count(value) for value in removed],
                "text": [format_count(value) for value in after],
                "textposition": "inside",
                "insidetextanchor": "start",
                "textfont": {"color": "@onbar"},
                "hovertemplate": "<b>%{y}</b><br>%{x:,} cells kept, %{customdata} removed<extra></extra>",
            },
            {
                "type": "bar",
                "orientation": "h",
                "x": numbers(removed, 9),
                "y": labels,
                "name": "removed by this filter",
                "marker": {"color": "@main"},
                "hovertemplate": "<b>%{y}</b><br>%{x:,} cells removed<extra></extra>",
            },
        ],
        "layout": {
            "barmode": "stack",
            "bargap": 0.25,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
            "xaxis": {"title": {"text": "cells"}},
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False},
        },
    }
    kept, total = float(after[-1]), float(after[0])
    caption = Caption(
        title="Cells lost to each filter",
        shows="Cells left after each filter, in the order of application, and the cells it removed.",
        read="One long orange bar is the filter to question first.",
        n=f"{format_count(kept)} of {format_count(total)} cells kept"
        + (f" ({format_percent(kept / total)})" if total else ""),
        thresholds="; ".join(
            f"{row['filter'].replace('_', ' ')} {row['threshold']}"
            for _, row in rows.iterrows()
            if not pd.isna(row["threshold"]) and str(row["threshold"]) not in ("", "nan")
        )
        or "see the table below",
        misleads="A cell is counted at the first filter that removes it, so the order decides which filter "
        "gets the blame.",
    )
    return Figure("funnel", {"": spec}, caption, height=110 + 34 * len(names))


def _short(rule: str) -> str:
    """Return a threshold that fits beside a bar; the table of filters has the whole of it."""
    return rule if len(rule) <= MAX_RULE else rule[: MAX_RULE - 1].rstrip(" ,") + "…"


def _test_sets(inputs: ReportInputs) -> set[str]:
    return {perturbation_of(name) for name in set(inputs.metrics["perturbation"]) - {contracts.WHOLE_MODEL}}


def _cells_figure(inputs: ReportInputs) -> Figure:
    table = inputs.perturbations.sort_values(
        ["n_cells", "perturbation"], ascending=[False, True], kind="stable"
    )
    control = table["perturbation"] == contracts.CONTROL
    table = table[~control]
    tested = table["perturbation"].isin(_test_sets(inputs))
    position = np.arange(1, len(table) + 1)
    traces = []
    for chosen, name, color in (
        (tested, "held out in some fold", "@main"),
        (~tested, "never scored", "@negative"),
    ):
        traces.append(
            {
                "type": "bar",
                "name": name,
                "x": position[chosen.to_numpy()].tolist(),
                "y": numbers(table.loc[chosen, "n_cells"], 9),
                "marker": {"color": color},
                "customdata": [escape(p) for p in table.loc[chosen, "perturbation"]],
                "hovertemplate": "<b>%{customdata}</b><br>%{y:,} cells<extra></extra>",
            }
        )
    median = float(table["n_cells"].median()) if len(table) else 0.0
    caption = Caption(
        title="Cells per perturbation",
        shows="Every perturbation that passed quality control, most cells first; control is left out.",
        read="Few cells mean a noisy truth: the duplicate, and with it every score, is limited there.",
        n=f"{format_count(len(table))} perturbations, median {format_count(median)} cells (dotted)",
        thresholds="the filter for the minimal number of cells is in the table of filters",
        misleads="Perturbations that kill cells have few of them: the count is itself a result.",
    )
    layout = {
        "bargap": 0.1,
        "barmode": "overlay",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": "perturbation, by number of cells"}, "showgrid": False},
        "yaxis": {"title": {"text": "cells"}, "rangemode": "tozero"},
        "shapes": [line(median, "y")],
    }
    return Figure(
        "cells", {"": {"data": [t for t in traces if t["x"]], "layout": layout}}, caption, height=320
    )


def split_values(value: Any) -> list[float]:
    """Return the numbers of a cell such as ``-1.2;-0.4``, one per perturbed gene; missing ones as NaN."""
    parts = [value] if isinstance(value, int | float) else str(value).split(";")
    found = []
    for part in parts:
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
    return found


def on_target_points(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per perturbed and measured gene: ``perturbation, gene, log2fc, p``."""
    rows = []
    for _, row in table.iterrows():
        genes = str(row["perturbation"]).split(contracts.GENE_SEPARATOR)
        changes, ps = split_values(row["on_target_log2fc"]), split_values(row["on_target_p"])
        ps += [math.nan] * (len(changes) - len(ps))
        names = genes if len(genes) == len(changes) else [str(row["perturbation"])] * len(changes)
        rows += [
            {"perturbation": row["perturbation"], "gene": gene, "log2fc": change, "p": p}
            for gene, change, p in zip(names, changes, ps, strict=False)
            if not math.isnan(change)
        ]
    return pd.DataFrame(rows, columns=["perturbation", "gene", "log2fc", "p"])


def on_target_figure(table: pd.DataFrame, limit: int = MAX_POINTS, expected: str = "") -> Figure | None:
    """Draw the change of at most ``limit`` measured targets against p, as in ``perturbations.tsv``.

    ``expected`` is ``down`` or ``up`` where the type of perturbation says what targets should do.
    """
    points = on_target_points(table)
    if points.empty:
        return None
    height = [-math.log10(max(p, SMALLEST_P)) if not math.isnan(p) else 0.0 for p in points["p"]]
    points = points.assign(height=height)
    clear = (points["p"] < MOVED_P) & (points["log2fc"].abs() >= MOVED_LOG2FC)
    drawn = np.isin(np.arange(len(points)), evenly(points, limit).index)
    data = []
    for chosen, name, color in ((clear, "moved", "@main"), (~clear, "not clearly moved", "@negative")):
        keep = chosen.to_numpy() & drawn
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": numbers(points.loc[keep, "log2fc"], 4),
                "y": numbers(np.asarray(height)[keep], 4),
                "marker": {"color": color, "size": 8, "opacity": 0.8,
                           "symbol": "circle" if color == "@main" else "circle-open"},
                "customdata": [
                    [escape(p), escape(g)]
                    for p, g in zip(points.loc[keep, "perturbation"], points.loc[keep, "gene"], strict=True)
                ],
                "hovertemplate": "<b>%{customdata[1]}</b> in %{customdata[0]}<br>log2 fold change %{x:.2f}"
                "<br>−log10 p %{y:.1f}<extra></extra>",
            }
        )  # fmt: skip
    down, up = int((points["log2fc"] < 0).sum()), int((points["log2fc"] > 0).sum())
    cut = int((points["p"] < SMALLEST_P).sum())
    read = {
        "down": "Targets should lie to the left, repressed. A perturbation near 0 may not work.",
        "up": "Targets should lie to the right, activated. A perturbation near 0 may not work.",
    }
    caption = Caption(
        title="On-target effect",
        shows="Change of the perturbed gene itself against control cells, for genes that were measured.",
        read=read.get(
            expected,
            "Knock-down lies to the left, activation to the right. A perturbation near 0 may not work.",
        ),
        n=f"{format_count(len(points))} measured target{'' if len(points) == 1 else 's'}, "
        f"{format_count(down)} down and {format_count(up)} up"
        + (f"; at most {format_count(limit)} drawn" if len(points) > limit else ""),
        thresholds=f"moved: p < {MOVED_P:g} (rank test, not corrected) and |log2 fold change| ≥ "
        f"{MOVED_LOG2FC:g} (dotted)"
        + (f"; {format_count(cut)} with p below 10⁻⁵⁰ drawn at 50" if cut else ""),
        misleads="A knock-out can leave the transcript untouched and still remove the protein. p depends on "
        "the number of cells. Genes outside the measured panel are not shown.",
    )
    layout = {
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": "log2 fold change of the target"}},
        "yaxis": {"title": {"text": "−log10 p"}, "range": from_zero(max(height))},
        "shapes": [
            line(0, "x", dash="solid", color="@rule"),
            *(line(value, "x") for value in (-MOVED_LOG2FC, MOVED_LOG2FC)),
            line(-math.log10(MOVED_P), "y"),
        ],
        "annotations": _target_names(points[clear & drawn]),
    }
    return Figure("on-target", {"": {"data": data, "layout": layout}}, caption, height=360)


def _target_names(points: pd.DataFrame) -> list[dict[str, Any]]:
    """Name the targets that changed most, above their points, but none where another name stands."""
    order = points["log2fc"].abs().sort_values(ascending=False, kind="stable").index
    notes: list[dict[str, Any]] = []
    width = NAME_WIDTH * max(np.ptp(points["log2fc"]), MOVED_LOG2FC) if len(points) else 0.0
    height = NAME_HEIGHT * points["height"].max() if len(points) else 0.0
    for row in points.loc[order[:NAMED_TARGETS]].to_dict("records"):
        taken = [
            abs(note["x"] - row["log2fc"]) < width and abs(note["y"] - row["height"]) < height
            for note in notes
        ]
        if any(taken):
            continue
        notes.append(
            {
                "x": numbers([row["log2fc"]], 4)[0], "y": numbers([row["height"]], 4)[0],
                "text": escape(row["gene"]), "showarrow": False,
                "font": {"size": 11, "color": "@ink"},
                "yanchor": "bottom", "yshift": 4,
            }
        )  # fmt: skip
    return notes


def effect_figure(table: pd.DataFrame, limit: int = MAX_POINTS) -> Figure | None:
    """Draw effect sizes against cells, as in ``perturbations.tsv``; at most ``limit`` of each kind."""
    rows = table[table["perturbation"] != contracts.CONTROL].dropna(subset=["effect_size", "n_cells"])
    if rows.empty:
        return None
    clear = (rows["effect_q"] < 0.05).to_numpy()
    data = []
    for chosen, name, color, symbol in (
        (clear, "q < 0.05", "@main", "circle"),
        (~clear, "no detectable effect", "@negative", "circle-open"),
    ):
        part = evenly(rows[chosen], limit)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": numbers(part["n_cells"], 9),
                "y": numbers(part["effect_size"], 4),
                "marker": {"color": color, "symbol": symbol, "size": 8, "opacity": 0.8},
                "customdata": [[escape(p), format_count(d)] for p, d in
                               zip(part["perturbation"], part["n_deg"], strict=True)],
                "hovertemplate": "<b>%{customdata[0]}</b><br>%{x:,} cells, effect %{y:.3f}<br>"
                "%{customdata[1]} significant genes<extra></extra>",
            }
        )  # fmt: skip
    caption = Caption(
        title="Size of the effect",
        shows="Energy distance (unbiased) between the cells of a perturbation and control cells.",
        read="Open circles could not be told from control; no model can be asked to predict them.",
        n=f"{format_count(clear.sum())} of {format_count(len(rows))} have a detectable effect"
        + (f"; at most {format_count(limit)} of each kind drawn" if len(rows) > limit else ""),
        thresholds="q < 0.05, permutation test, Benjamini–Hochberg over perturbations",
        misleads="More cells make a smaller effect detectable. This describes the whole screen, held-out "
        "cells included; nothing in it is used in training.",
    )
    layout = {
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {"title": {"text": "cells"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "effect size"}},
    }
    return Figure("effects", {"": {"data": data, "layout": layout}}, caption, height=360)
