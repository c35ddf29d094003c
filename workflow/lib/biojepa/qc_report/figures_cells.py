"""Figures of cells and guides: filters, distributions with their limits, knee, guides of a cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biojepa import contracts
from biojepa.guides.assign import ASSIGNED, NO_GUIDE, TOO_MANY_GUIDES
from biojepa.guides.settings import DOMINANCE, MIXTURE, GuideAssignment
from biojepa.qc_report.inputs import QcInputs
from biojepa.report.figures import Caption, Figure, Spec, escape, evenly, from_zero, line, numbers
from biojepa.report.tables import format_count, format_number, format_percent

# Title, unit of the axis, whether the axis is logarithmic, and what to look for.
METRICS = {
    contracts.LIBRARY_SIZE: (
        "UMIs",
        "UMIs",
        True,
        "One hump whose tails are cut. A limit in the middle of a hump, or a second hump of small cells that "
        "is kept, is the thing to mend.",
    ),
    "n_genes": (
        "Detected genes",
        "genes",
        False,
        "As for UMIs. Many cells just above the lower limit are empty droplets that passed.",
    ),
    "pct_mito": (
        "Mitochondrial share",
        "% of UMIs",
        False,
        "A hump at a few percent with a thin tail. A limit that cuts the hump loses healthy cells; cell "
        "types differ in how much is normal.",
    ),
    "doublet_score": (
        "Doublet score",
        "Scrublet score",
        False,
        "A small second hump to the right, cut off where doublets are called. Without one, Scrublet could "
        "not tell doublets apart.",
    ),
}
# Batches drawn, and batches whose limits are drawn one by one.
MAX_BATCHES, MAX_LIMITS = 40, 6
MAX_GUIDES = 1_000
LIMITS = {"limit_low": "lower limit", "limit_high": "upper limit"}
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}


def distribution_figures(inputs: QcInputs) -> list[Figure]:
    """Draw each metric of quality: all cells with the limits, and batch by batch."""
    present = set(inputs.distributions["metric"])
    return [_distribution_figure(inputs, metric) for metric in METRICS if metric in present]


def _distribution_figure(inputs: QcInputs, metric: str) -> Figure:
    title, unit, logged, look = METRICS[metric]
    bins = inputs.distributions[inputs.distributions["metric"] == metric]
    rows = inputs.batches[(inputs.batches["metric"] == metric) & (inputs.batches["cells"] > 0)]
    rows = rows.dropna(subset=["median"])
    options = {"all cells": _histogram(bins, rows, unit, logged)}
    if len(rows) > 1:
        options["batch by batch"] = _boxes(_extremes(rows), unit, logged)
    n, kept, poor = (int(bins[name].sum()) for name in ("cells", "cells_kept", "cells_low_quality"))
    grey = n - kept - poor
    colors = {"kept (blue)": kept, "of poor quality (orange)": poor, "unassigned (grey)": grey}
    shown = [name for name, cells in colors.items() if cells]
    misleads = []
    if poor:
        misleads.append("Orange cells were dropped by any filter of quality, not only by this one.")
    if grey:
        misleads.append("Grey ones have no perturbation, more than is accepted, or one with too few cells.")
    low, high = _limits(rows)
    caption = Caption(
        title=title,
        shows=f"Cells {', '.join(shown)}; dotted: limits. "
        + ("Batch by batch: quartiles, 5th and 95th percentile before the filters." if len(rows) > 1 else ""),
        read=look,
        n=f"{format_count(n)} cells, {format_count(kept)} kept, {format_count(poor)} of poor quality"
        + (
            f"; {MAX_BATCHES} of {len(rows)} batches, those that differ most"
            if len(rows) > MAX_BATCHES
            else ""
        ),
        thresholds=_limits_told(low, high, unit),
        misleads=" ".join(misleads),
    )
    return Figure(f"distribution-{metric}", options, caption, height=320, selector="Show")


def _limits(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct lower and upper limits of the batches, sorted."""
    low, high = (np.unique(rows[name].dropna().to_numpy(dtype=float)) for name in ("limit_low", "limit_high"))
    return low, high


def _limits_told(low: np.ndarray, high: np.ndarray, unit: str) -> str:
    parts = []
    for values, word in ((low, "at least"), (high, "at most")):
        if len(values):
            ends = dict.fromkeys(
                format_count(round(value)) if value >= 20 else format_number(value, 1)
                for value in values[[0, -1]]
            )
            parts.append(f"{word} {' to '.join(ends)} {unit}" + (", by batch" if len(ends) > 1 else ""))
    return "; ".join(parts) or "none by limits of this metric alone"


def _steps(bins: pd.DataFrame, cells: pd.Series) -> tuple[list[Any], list[Any]]:
    """Return the outline of a histogram, from nothing to nothing."""
    edges = [*bins["bin_low"], bins["bin_high"].iloc[-1]]
    return numbers(edges, 6), [*(int(n) for n in cells), 0]


def _histogram(bins: pd.DataFrame, rows: pd.DataFrame, unit: str, logged: bool) -> Spec:
    if logged:  # no logarithm of nothing: the first bin begins at 1
        bins = bins[bins["bin_high"] > 1]
        bins = bins.assign(bin_low=bins["bin_low"].clip(lower=1))
    layers = (
        ("unassigned", bins["cells"], "@negative"),
        ("poor quality", bins["cells_kept"] + bins["cells_low_quality"], "@main"),
        ("kept", bins["cells_kept"], "@baseline"),
    )
    # Areas lie upon each other, so that of each its own part is seen; that is what hovering tells.
    own = [bins["cells"] - layers[1][1], bins["cells_low_quality"], bins["cells_kept"]]
    data = []
    for (name, cells, color), part in zip(layers, own, strict=True):
        if name != "kept" and not part.any():
            continue
        x, y = _steps(bins, cells)
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "fill": "tozeroy",
                "line": {"shape": "hv", "width": 1, "color": color}, "fillcolor": color,
                "customdata": [*(int(n) for n in part), 0],
                "hovertemplate": "%{customdata:,} cells",
            }
        )  # fmt: skip
    shapes = []
    for values in _limits(rows):
        drawn = values if len(values) <= MAX_LIMITS else values[[0, -1]]
        shapes += [{**line(float(value), "x"), "layer": "above"} for value in drawn]
    axis: Spec = {"title": {"text": unit}, "showgrid": False, "hoverformat": ",.4g"}
    if logged:
        axis |= log_axis(bins["bin_low"].min(), bins["bin_high"].max())
    layout = {"legend": LEGEND, "xaxis": axis, "yaxis": {"title": {"text": "cells"}, "rangemode": "tozero"}}
    return {"data": data, "layout": {**layout, "shapes": shapes, "hovermode": "x unified"}}


def log_axis(low: float, high: float) -> Spec:
    """Return a logarithmic axis with ticks at 1, 2 and 5 times the powers of ten, fewer over many decades."""
    low, high = max(float(low), 1.0), max(float(high), 2.0)
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = [1, 2, 5] if np.log10(high / low) <= 3 else [1]
    ticks = [float(step * 10**decade) for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [format_count(tick) for tick in ticks]}


def rank_axis(n: int, title: str) -> Spec:
    """Return an axis of ranks from 1 to ``n``, with room for the first and the last point."""
    steps = [step * 10**decade for decade in range(9) for step in (1, 2, 5)]
    step = next(step for step in steps if n <= 7 * step)
    ticks = [1, *range(step, n + 1, step)] if step > 1 else list(range(1, n + 1))
    room = max(0.5, 0.02 * n)
    return {
        "title": {"text": title}, "showgrid": False, "zeroline": False, "range": [1 - room, n + room],
        "tickvals": ticks, "ticktext": [format_count(tick) for tick in ticks],
    }  # fmt: skip


def _extremes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the batches with the lowest and the highest medians, lowest first."""
    rows = rows.sort_values(["median", "batch"], kind="stable")
    if len(rows) <= MAX_BATCHES:
        return rows.sort_values("batch", kind="stable")
    return pd.concat([rows[: MAX_BATCHES // 2], rows[-MAX_BATCHES // 2 :]])


def _boxes(rows: pd.DataFrame, unit: str, logged: bool) -> Spec:
    names = [escape(name) for name in rows["batch"].astype(str)]
    low = rows[["p5", "p25", "median", "p75", "p95"]].astype(float)
    low = low.clip(lower=1) if logged else low
    data: list[Spec] = [
        {
            "type": "box", "orientation": "h", "name": "cells before the filters", "y": names,
            "lowerfence": numbers(low["p5"]), "q1": numbers(low["p25"]), "median": numbers(low["median"]),
            "q3": numbers(low["p75"]), "upperfence": numbers(low["p95"]),
            "line": {"color": "@baseline", "width": 1.4}, "fillcolor": "@band", "showlegend": True,
            "hoverinfo": "x+y",
        }
    ]  # fmt: skip
    limits = [(c, name) for c, name in LIMITS.items() if rows[c].notna().any()]
    for at, (column, name) in enumerate(limits):
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": "limits", "legendgroup": "limits",
                "showlegend": at == 0, "y": names,
                "x": numbers(rows[column]),
                "marker": {"symbol": "line-ns-open", "size": 12, "color": "@main",
                           "line": {"width": 2, "color": "@main"}},
                "customdata": [format_count(n) for n in rows["cells"]],
                "hovertemplate": "%{y}: " + name + " %{x:,.4g}<br>%{customdata} cells<extra></extra>",
            }
        )  # fmt: skip
    axis: Spec = {"title": {"text": unit}}
    axis |= log_axis(low["p5"].min(), low["p95"].max()) if logged else {"rangemode": "tozero"}
    names_axis = {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False}
    return {"data": data, "layout": {"legend": LEGEND, "xaxis": axis, "yaxis": names_axis}}


def guide_figures(inputs: QcInputs) -> list[Figure]:
    """Draw the knee of guide UMIs, guides of a cell and cells of a guide, where guides were counted."""
    figures = []
    if len(inputs.guide_umis):
        figures.append(_knee_figure(inputs))
    if len(inputs.guides_per_cell):
        figures.append(_classes_figure(inputs.guides_per_cell, inputs.assignment))
    if len(inputs.guide_calls):
        figures.append(_guide_cells_figure(inputs.guide_calls, inputs.assignment))
    return figures


def _knee_figure(inputs: QcInputs) -> Figure:
    table = inputs.guide_umis
    seen = table[table["guide_umis"] > 0]
    thresholds = inputs.guide_calls["threshold"].dropna().astype(float)
    shapes, told = [], "those of the guides are not known here"
    if len(thresholds):
        low, middle, high = thresholds.min(), thresholds.median(), thresholds.max()
        shapes = [line(float(middle), "y")]
        told = f"a guide is called from {format_count(middle)} UMIs of its own on (dotted)"
        if low < high:
            told += f", the median of {format_count(low)} to {format_count(high)}"
        told += "; the curve is the sum over all guides of a cell"
    cells = int(table["rank"].max())
    spec = {
        "data": [
            {
                "type": "scatter", "mode": "lines", "x": numbers(seen["rank"], 9),
                "y": numbers(seen["guide_umis"], 6), "line": {"color": "@baseline", "width": 2.2},
                "hovertemplate": "%{x:,} cells have %{y:,} guide UMIs or more<extra></extra>",
            }
        ],
        "layout": {
            "showlegend": False,
            "xaxis": {**log_axis(1, cells), "title": {"text": "rank of the cell by guide UMIs"}},
            "yaxis": {**log_axis(1, seen["guide_umis"].max()), "title": {"text": "guide UMIs of the cell"}},
            "shapes": shapes,
        },
    }  # fmt: skip
    caption = Caption(
        title="Knee of guide UMIs",
        shows="UMIs of all guides in each cell, most first.",
        read="A plateau and then a steep fall: cells with a guide, and ambient RNA. The threshold should lie "
        "below the plateau and above the foot.",
        n=f"{format_count(cells)} cells, about {format_count(_with_umis(table))} of them with a guide UMI",
        thresholds=told,
        misleads="Without a knee, guides were captured too poorly to say which cell carries which. A screen "
        "of several guides in a cell has a longer plateau, not a second one.",
    )
    return Figure("knee", {"": spec}, caption, height=320)


def _with_umis(table: pd.DataFrame) -> int:
    """Return how many cells have a guide UMI, up to the thinning of the curve."""
    seen = table.loc[table["guide_umis"] > 0, "rank"]
    return int(seen.max()) if len(seen) else 0


STATUS_STYLE = {
    NO_GUIDE: ("no guide that stands out", "@negative"),
    ASSIGNED: ("assigned", "@baseline"),
    TOO_MANY_GUIDES: ("more than accepted", "@main"),
}


def _classes_figure(table: pd.DataFrame, rule: GuideAssignment | None) -> Figure:
    # Only dominance leaves the number open: it asks for the share of the top guide and counts no others.
    unclear = f"top guide below {format_percent(rule.share)}" if rule else "no guide dominates"
    number = table["n_guides"].map(lambda n: unclear if pd.isna(n) else format_count(n))
    counted, misleads = bool(table["n_guides"].notna().all()), ""
    if not counted:
        misleads = (
            f"“{unclear}”: of the guide UMIs of the cell. The others are of another guide, "
            "or ambient RNA. How many guides such a cell has is not counted."
        )
    elif rule and rule.method == MIXTURE:
        misleads = "A cell with a called guide can still have none that stands out of its background."
    data = []
    for status, (name, color) in STATUS_STYLE.items():
        chosen = (table["status"] == status).to_numpy()
        if chosen.any():
            data.append(
                {
                    "type": "bar", "name": name, "x": number[chosen].tolist(),
                    "y": numbers(table.loc[chosen, "cells"], 9), "marker": {"color": color},
                    "customdata": [format_percent(share) for share in table.loc[chosen, "share"]],
                    "hovertemplate": "%{x}: %{y:,} cells (%{customdata})<extra>" + name + "</extra>",
                }
            )  # fmt: skip
    shares = table.groupby("status")["share"].sum()
    layout = {
        "barmode": "stack",
        "bargap": 0.25,
        "legend": LEGEND,
        "xaxis": {
            "type": "category",
            "categoryorder": "array",
            "categoryarray": list(dict.fromkeys(number)),
            "title": {"text": "guides called in a cell"},
        },
        "yaxis": {"title": {"text": "cells"}},
    }
    caption = Caption(
        title="Guides per cell",
        shows="Cells by the number of guides that were called in them, and what became of them.",
        read="Of a screen with one guide for a cell, most cells have one; a tail of more is doublets, "
        "an even spread a high multiplicity of infection.",
        n="; ".join(
            f"{STATUS_STYLE[status][0]} {format_percent(shares[status])}"
            for status in STATUS_STYLE
            if status in shares.index
        ),
        thresholds="those of preprocess.guide_assignment; the table of filters names them",
        misleads=misleads,
    )
    return Figure("guides-per-cell", {"": {"data": data, "layout": layout}}, caption, height=320)


def _guide_cells_figure(table: pd.DataFrame, rule: GuideAssignment | None) -> Figure:
    table = table.sort_values(["cells_assigned", "guide"], ascending=[False, True], kind="stable")
    table = table.assign(rank=np.arange(1, len(table) + 1))
    control = table["target"] == contracts.CONTROL
    doubtful = table["fallback"].fillna("").astype(str) != ""
    data = []
    for chosen, name, color, symbol in (
        (~control & ~doubtful, "targeting", "@baseline", "circle"),
        (control & ~doubtful, "control", "@positive", "square"),
        (doubtful, "threshold borrowed from other guides", "@main", "diamond-open"),
    ):
        part = evenly(table[chosen], MAX_GUIDES)
        if len(part):
            data.append(
                {
                    "type": "scatter", "mode": "markers", "name": name, "x": numbers(part["rank"], 9),
                    "y": numbers(part["cells_assigned"], 9),
                    "marker": {"color": color, "symbol": symbol, "size": 6, "opacity": 0.85},
                    "customdata": [
                        [escape(row.guide), escape(row.target), format_count(row.threshold),
                         format_count(row.umis)] for row in part.itertuples()
                    ],
                    "hovertemplate": "<b>%{customdata[0]}</b> (%{customdata[1]})<br>%{y:,} cells<br>"
                    "threshold %{customdata[2]} UMIs, %{customdata[3]} UMIs in all<extra></extra>",
                }
            )  # fmt: skip
    cells = table["cells_assigned"].to_numpy(dtype=float)
    single = rule is not None and rule.method == DOMINANCE
    tenth, ninetieth = np.quantile(cells, [0.1, 0.9])
    ratio = f"; 90th over 10th percentile {format_number(ninetieth / tenth, 1)}" if tenth > 0 else ""
    caption = Caption(
        title="Cells of each guide",
        shows="Cells that were given to each guide, most first.",
        read="A flat line is an even library. Guides at the foot were lost in cloning, or kill their cells"
        + ("; orange ones had too few cells or no background for a fit." if doubtful.any() else "."),
        n=f"{format_count(len(table))} guides, median {format_count(np.median(cells))} cells{ratio}"
        + (f"; at most {format_count(MAX_GUIDES)} of each kind drawn" if len(table) > MAX_GUIDES else ""),
        thresholds="a borrowed threshold is told by the column fallback of guide_calls.tsv"
        if doubtful.any()
        else "those at which a guide is called",
        misleads="" if single else "A cell with two accepted guides counts for both.",
    )
    layout = {
        "legend": LEGEND,
        "xaxis": rank_axis(len(table), "guide, by number of cells"),
        "yaxis": {"title": {"text": "cells"}, "range": from_zero(cells.max())},
    }
    return Figure("guide-cells", {"": {"data": data, "layout": layout}}, caption, height=320)
