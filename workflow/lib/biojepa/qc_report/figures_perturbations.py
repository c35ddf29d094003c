"""Figures of perturbations: cells, guides, effects, and a map of the cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biojepa import contracts
from biojepa.qc_report.figures_cells import LEGEND, log_axis, rank_axis
from biojepa.qc_report.inputs import RESPONDING_SHARE, QcInputs
from biojepa.qc_report.summary import expected_change
from biojepa.report.figures import (
    Caption,
    Figure,
    Spec,
    escape,
    evenly,
    from_zero,
    line,
    number,
    numbers,
    sentence,
)
from biojepa.report.figures_quality import effect_figure, on_target_figure
from biojepa.report.tables import format_count, format_p, format_percent

SIGNIFICANT = 0.05
# Points of a kind in one figure: those of a genome-wide screen take less than a megabyte together.
MAX_DRAWN = 1_000
COLORS = ("@c1", "@c2", "@c3", "@c4", "@c5", "@c6", "@c7")
# Names a colour-blind reader can tell apart, as the page's own colours are.
SCALE = "Cividis"
MIN_ON_MAP = 5
# Up to so many perturbations are bars with their names.
MAX_BARS = 40
# Names beside points, and in px: their distance, and the height of the plot between its axes.
MAX_NAMED, LINE_OF_TEXT, PLOT_HEIGHT = 5, 15, 270


def perturbation_figures(inputs: QcInputs) -> list[Figure]:
    """Draw cells and guides of each perturbation."""
    if inputs.perturbations.empty:
        return []
    figures = [_cells_figure(inputs)]
    if (inputs.perturbations["n_guides"] > 0).any():
        figures.append(_guides_figure(inputs.perturbations))
    return figures


def effect_figures(inputs: QcInputs) -> list[Figure]:
    """Draw what perturbations did: to their target, to the cells, to how many genes and cells."""
    table = inputs.perturbations
    if table.empty:
        return []
    found = [
        on_target_figure(table, MAX_DRAWN, expected_change(inputs)),
        effect_ranking(table, inputs.settings.get("permutations")),
        changed_genes(table),
        effect_figure(table, MAX_DRAWN),
    ]
    if table[RESPONDING_SHARE].notna().any():
        found.append(_responding_figure(table))
    if len(inputs.guides):
        found.append(_agreement_figure(inputs.guides))
    return [figure for figure in found if figure is not None]


def _ranked(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the rows that have a value, largest first, with their ``rank``."""
    rows = table.dropna(subset=[column])
    rows = rows.sort_values([column, "perturbation"], ascending=[False, True], kind="stable")
    return rows.assign(rank=np.arange(1, len(rows) + 1))


def _points(
    rows: pd.DataFrame, y: str, name: str, color: str, hover: str, symbol: str = "circle", x: str = "rank"
) -> Spec:
    """Return a trace of perturbations, at most ``MAX_DRAWN``, with their names to hover over."""
    part = evenly(rows, MAX_DRAWN)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": numbers(part[x], 9),
        "y": numbers(part[y], 4),
        "marker": {"color": color, "symbol": symbol, "size": 7, "opacity": 0.85},
        "customdata": [
            [escape(p), format_count(c), format_p(q), format_count(d)]
            for p, c, q, d in zip(
                part["perturbation"], part["n_cells"], part["effect_q"], part["n_deg"], strict=True
            )
        ],
        "hovertemplate": "<b>%{customdata[0]}</b><br>" + hover + "<extra></extra>",
    }


def _drawn(rows: pd.DataFrame) -> str:
    return f"; at most {format_count(MAX_DRAWN)} of each kind drawn" if len(rows) > MAX_DRAWN else ""


def _by_effect(rows: pd.DataFrame, y: str, hover: str, x: str = "rank") -> list[Spec]:
    """Return two traces: perturbations with a detectable effect, and all others.

    Points, or bars where there are few enough to name each.
    """
    clear = rows["effect_q"] < SIGNIFICANT
    kinds = (
        (rows[clear], f"q < {SIGNIFICANT:g}", "@main", "circle"),
        (rows[~clear], "no detectable effect", "@negative", "circle-open"),
    )
    return [
        _mark(part, y, name, color, hover, symbol, x, len(rows))
        for part, name, color, symbol in kinds
        if len(part)
    ]


def _mark(
    part: pd.DataFrame, y: str, name: str, color: str, hover: str, symbol: str, x: str, total: int
) -> Spec:
    """Return a trace of points, or of bars where the perturbations are few."""
    points = _points(part, y, name, color, hover, symbol, x)
    if total > MAX_BARS:
        return points
    own = ("name", "y", "customdata", "hovertemplate")
    names = [escape(p) for p in part["perturbation"]]
    return {"type": "bar", **{key: points[key] for key in own}, "x": names, "marker": {"color": color}}


def _across(rows: pd.DataFrame, title: str) -> Spec:
    """Return the part of a layout that tells ranked perturbations: their names, or ranks of many."""
    if len(rows) > MAX_BARS:
        return {"xaxis": rank_axis(len(rows), f"perturbation, {title}")}
    axis = {
        "type": "category", "categoryorder": "array", "showgrid": False,
        "categoryarray": [escape(p) for p in rows["perturbation"]],
        "tickangle": -90 if len(rows) > 12 else "auto", "tickfont": {"size": 10},
        "range": [-0.6, len(rows) - 0.4],
    }  # fmt: skip
    return {"barmode": "overlay", "bargap": 0.25, "xaxis": axis}


def _cells_figure(inputs: QcInputs) -> Figure:
    rows = _ranked(inputs.perturbations, "n_cells")
    minimum, median = inputs.min_cells, float(rows["n_cells"].median())
    shapes = [line(median, "y", dash="dash", color="@soft")]
    if minimum is not None:
        shapes.append(line(minimum, "y"))
    layout = {
        "legend": LEGEND,
        **_across(rows, "by number of cells"),
        # A bar begins at 0, which a logarithmic axis has not.
        "yaxis": {
            **({} if len(rows) <= MAX_BARS else log_axis(rows["n_cells"].min(), rows["n_cells"].max())),
            "title": {"text": "cells"},
        },
        "shapes": [{**shape, "layer": "above"} for shape in shapes],
    }
    caption = Caption(
        title="Cells per perturbation",
        shows="Every perturbation that was kept, most cells first; control is left out.",
        read="Perturbations close to the dotted line have a noisy mean. Those without a detectable effect at "
        "the right end may only lack cells; at the left end they do nothing.",
        n=f"{format_count(len(rows))} perturbations, median {format_count(median)} cells (dashed)"
        + _drawn(rows),
        thresholds=f"kept from {format_count(minimum)} cells on (dotted)"
        if minimum is not None
        else "none drawn",
        misleads="Perturbations that kill cells have few of them: the count is itself a result.",
    )
    hover = "%{y:,} cells, q %{customdata[2]}"
    spec = {"data": _by_effect(rows, "n_cells", hover), "layout": layout}
    return Figure("cells", {"": spec}, caption, height=330)


def _guides_figure(table: pd.DataFrame) -> Figure:
    counts = table["n_guides"].value_counts().sort_index()
    spec = {
        "data": [
            {
                "type": "bar", "x": [str(n) for n in counts.index], "y": numbers(counts, 9),
                "marker": {"color": ["@main" if n <= 1 else "@baseline" for n in counts.index]},
                "hovertemplate": "%{y:,} perturbations have %{x} guides<extra></extra>",
            }
        ],
        "layout": {
            "bargap": 0.25,
            "xaxis": {"type": "category", "title": {"text": "guides seen in the cells of a perturbation"}},
            "yaxis": {"title": {"text": "perturbations"}},
        },
    }  # fmt: skip
    one = int((table["n_guides"] == 1).sum())
    caption = Caption(
        title="Guides per perturbation",
        shows="Perturbations by the number of their guides that were kept.",
        read="Two or more, so that an effect can be compared between guides"
        + ("; orange ones cannot be." if one else "."),
        n=f"{format_count(len(table))} perturbations, {format_count(one)} with one guide",
        thresholds="flag one_guide",
        misleads="A guide counts with a single cell. Of a combination, the gene with fewest counts.",
    )
    return Figure("guides-per-perturbation", {"": spec}, caption, height=330)


def effect_ranking(table: pd.DataFrame, permutations: int | None = None) -> Figure | None:
    """Rank perturbations by the size of their effect, tested by so many permutations."""
    rows = _ranked(table, "effect_size")
    if rows.empty:
        return None
    clear = int((rows["effect_q"] < SIGNIFICANT).sum())
    layout: Spec = {
        "legend": LEGEND,
        **_across(rows, "by size of effect"),
        "yaxis": {"title": {"text": "effect size"}},
        "shapes": [line(0, "y")],
    }
    if len(rows) > MAX_BARS:
        layout["annotations"] = _strongest(rows)
    hover = "effect %{y:.3f}, q %{customdata[2]}<br>%{customdata[1]} cells, %{customdata[3]} changed genes"
    caption = Caption(
        title="Ranking of effects",
        shows="Unbiased energy distance between a perturbation and controls of its batches, strongest first.",
        read="A few strong perturbations, then a shoulder, then a floor around 0. Known strong genes should "
        "be at the top; grey ones cannot be told from control.",
        n=f"{format_count(clear)} of {format_count(len(rows))} have a detectable effect{_drawn(rows)}",
        thresholds="q < 0.05, permutation test, Benjamini–Hochberg over perturbations"
        + _smallest_q(rows, permutations),
        misleads="A strong effect may be that of dying cells or of an off-target of one guide.",
    )
    spec = {"data": _by_effect(rows, "effect_size", hover), "layout": layout}
    return Figure("effect-ranking", {"": spec}, caption, height=360)


def _smallest_q(rows: pd.DataFrame, permutations: int | None) -> str:
    """Say how many perturbations share the smallest q that so many permutations can give."""
    if permutations is None:
        return ""
    smallest = 1 / (int(permutations) + 1)
    at = rows["effect_p"] <= smallest * (1 + 1e-6)
    if not at.any():
        return ""
    return (
        f"; {format_count(permutations)} permutations give no p below {smallest:.1g}, so that "
        f"{format_count(at.sum())} share q {format_p(rows.loc[at, 'effect_q'].max())}: compare their sizes"
    )


def _strongest(rows: pd.DataFrame) -> list[Spec]:
    """Name the first few of ranked rows, each with a line to its point, a line of text apart."""
    named = rows[rows["effect_q"] < SIGNIFICANT][:MAX_NAMED]
    px = PLOT_HEIGHT / max(rows["effect_size"].max() - rows["effect_size"].min(), 1e-9)
    notes, free = [], 0.0
    for row in named.to_dict("records"):
        # Pixels below the strongest point: of this one, and of its name.
        at = (named["effect_size"].max() - row["effect_size"]) * px
        free = max(at, free)
        notes.append(
            {
                "x": row["rank"], "y": number(row["effect_size"], 4), "text": escape(row["perturbation"]),
                "showarrow": True, "arrowhead": 0, "arrowwidth": 0.8, "arrowcolor": "@soft", "standoff": 4,
                "ax": 34, "ay": round(free - at), "xanchor": "left", "font": {"size": 11, "color": "@ink"},
            }
        )  # fmt: skip
        free += LINE_OF_TEXT
    return notes


def changed_genes(table: pd.DataFrame) -> Figure | None:
    """Rank perturbations by the number of genes that they change."""
    rows = _ranked(table, "n_deg")
    if rows.empty:
        return None
    none = int((rows["n_deg"] == 0).sum())
    low, high = from_zero(rows["n_deg"].max())
    layout = {
        "legend": LEGEND,
        **_across(rows, "by number of changed genes"),
        "yaxis": {"title": {"text": "changed genes"}, "range": [0 if len(rows) <= MAX_BARS else low, high]},
    }
    caption = Caption(
        title="Changed genes",
        shows="Genes that differ between the cells of a perturbation and control cells.",
        read="Should agree with the ranking of effects. Many changed genes without a detectable effect, or "
        "the reverse, is worth a look.",
        n=f"{format_count(len(rows))} perturbations, {format_count(none)} without a changed gene"
        + _drawn(rows),
        thresholds="Welch's t against control, Benjamini–Hochberg over the genes of a perturbation, q < 0.05",
        misleads="The number grows with the cells: of two equal effects, the one with more cells changes "
        "more genes significantly. Not adjusted for batch: where a perturbation is not spread over batches "
        "as the controls are, genes that differ between batches count.",
    )
    hover = "%{y:,} changed genes, %{customdata[1]} cells, q %{customdata[2]}"
    spec = {"data": _by_effect(rows, "n_deg", hover), "layout": layout}
    return Figure("changed-genes", {"": spec}, caption, height=360)


def _responding_figure(table: pd.DataFrame) -> Figure | None:
    rows = _ranked(table, RESPONDING_SHARE)
    if rows.empty:
        return None
    layout = {
        "showlegend": False,
        **_across(rows, "by share of responding cells"),
        "yaxis": {
            "title": {"text": "cells that respond"},
            "range": [0 if len(rows) <= MAX_BARS else -0.04, 1.05],
            "tickformat": ".0%",
        },
        "shapes": [{**line(0.5, "y"), "layer": "above"}],
    }
    caption = Caption(
        title="Cells that respond",
        shows="Share of the cells of a perturbation that look perturbed rather than like control cells.",
        read="Low shares with a clear effect are cells that escaped: guides that cut or repress only some of "
        "their cells.",
        n=f"{format_count(len(rows))} of {format_count(len(table))} perturbations, median "
        + format_percent(rows[RESPONDING_SHARE].median()),
        thresholds="a cell responds from a posterior of 0.5 on; perturbations are left out whose responding "
        "cells overlap too much with control to be told apart, and those without a detectable effect or with "
        "fewer than five changed genes",
        misleads="A weak effect that all cells share looks like a strong one that few have.",
    )
    hover = "%{y:.0%} of %{customdata[1]} cells respond"
    data = [_mark(rows, RESPONDING_SHARE, "perturbations", "@baseline", hover, "circle", "rank", len(rows))]
    spec = {"data": data, "layout": layout}
    return Figure("responding", {"": spec}, caption, height=360)


def _agreement_figure(guides: pd.DataFrame) -> Figure | None:
    rows = guides.dropna(subset=["agreement", "effect_size"])
    if rows.empty:
        return None
    # A guide may be weak too, which is a matter of its target alone.
    flagged = rows["flag"].fillna("").str.split(";").map(lambda flags: contracts.DISCORDANT in flags)
    data = []
    for chosen, name, color, symbol in (
        (flagged, "disagrees with its siblings", "@main", "diamond"),
        (~flagged, "agrees", "@baseline", "circle-open"),
    ):
        part = evenly(rows[chosen], MAX_DRAWN)
        if len(part):
            data.append(
                {
                    "type": "scatter", "mode": "markers", "name": name, "x": numbers(part["agreement"], 4),
                    "y": numbers(part["effect_size"], 4),
                    "marker": {"color": color, "symbol": symbol, "size": 8, "opacity": 0.85},
                    "customdata": [
                        [escape(row.guide_id), escape(row.perturbation), format_count(row.n_cells),
                         format_p(row.q)] for row in part.itertuples()
                    ],
                    "hovertemplate": "<b>%{customdata[0]}</b> (%{customdata[1]})<br>agreement %{x:.3f}, "
                    "effect %{y:.3f}<br>%{customdata[2]} cells, q %{customdata[3]}<extra></extra>",
                }
            )  # fmt: skip
    caption = Caption(
        title="Guides against their siblings",
        shows="Each guide: how far its effect agrees with that of the other guides of its perturbation, and "
        "how large it is.",
        read=("Orange guides do something else than their siblings. " if flagged.any() else "")
        + "A large effect that no sibling shares is off-target; one without effect beside siblings that have "
        "one does not work.",
        n=f"{format_count(len(rows))} guides with siblings, {format_count(flagged.sum())} disagree",
        thresholds="permutation of cells among the guides of a perturbation, Benjamini–Hochberg over guides",
        misleads="With few cells of a guide, disagreement stays unseen.",
    )
    layout = {
        "legend": LEGEND,
        "xaxis": {"title": {"text": "agreement with the siblings"}},
        "yaxis": {"title": {"text": "effect size of the guide"}},
    }
    return Figure("guide-agreement", {"": {"data": data, "layout": layout}}, caption, height=360)


# Title and label of what a map may be coloured by, beside perturbation and batch.
CONTINUOUS = {
    contracts.LIBRARY_SIZE: "UMIs",
    "pct_mito": "% mitochondrial",
    "doublet_score": "doublet score",
    "responding_posterior": "posterior of responding",
}


def map_figure(inputs: QcInputs) -> Figure | None:
    """Draw the sampled cells, coloured by one property at a time."""
    cells = inputs.cell_map
    if cells is None or cells.empty:
        return None
    options = {"perturbation": _map_by_perturbation(cells, inputs.perturbations)}
    if cells[contracts.BATCH].nunique() > 1:
        options["batch"] = _map_by_category(cells, contracts.BATCH)
    for column, label in CONTINUOUS.items():
        if column in cells and cells[column].notna().any():
            options[label] = _map_by_value(cells, column, label)
    if "phase" in cells:
        options["phase of the cell cycle"] = _map_by_category(cells, "phase")
    caption = Caption(
        title="Map of the cells",
        shows="UMAP of principal components of log-expression, before any model.",
        read="Batches should lie upon each other: islands of a single batch are a batch effect. Islands of "
        "few UMIs or many mitochondrial ones are poor cells. Strong perturbations leave the control cells.",
        n=f"{format_count(len(cells))} of {format_count(inputs.cells.n_cells)} kept cells, drawn at random; "
        f"the {len(COLORS)} perturbations with the strongest detectable effect are coloured",
        thresholds="none; the axes have no unit",
        misleads="A map draws neighbourhoods, not distances: gaps and areas mean nothing. The cell cycle "
        "often makes the largest islands.",
    )
    return Figure("map", options, caption, height=560, selector="Colour by")


def _map_trace(rows: pd.DataFrame, name: str, color: Any, opacity: float = 0.7, size: float = 4.5) -> Spec:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": numbers(rows["umap_1"], 4),
        "y": numbers(rows["umap_2"], 4),
        "marker": {"size": size, "color": color, "opacity": opacity},
        "text": [escape(p) for p in rows[contracts.PERTURBATION]],
        "hovertemplate": "%{text}",
    }


def _map_layout() -> Spec:
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False}
    return {
        "legend": {**LEGEND, "itemsizing": "constant"},
        "xaxis": {**bare, "title": {"text": "UMAP 1"}},
        "yaxis": {**bare, "title": {"text": "UMAP 2"}, "scaleanchor": "x"},
    }


def _map_by_perturbation(cells: pd.DataFrame, table: pd.DataFrame) -> Spec:
    labels = cells[contracts.PERTURBATION].astype(str)
    seen = labels.value_counts()
    clear = table[table["effect_q"] < SIGNIFICANT]
    clear = clear.sort_values(["effect_size", "perturbation"], ascending=[False, True], kind="stable")
    top = [name for name in clear["perturbation"].astype(str) if seen.get(name, 0) >= MIN_ON_MAP][
        : len(COLORS)
    ]
    control = labels == contracts.CONTROL
    traces = [
        _map_trace(cells[~labels.isin([contracts.CONTROL, *top])], "all others", "@negative", 0.3),
        _map_trace(cells[control], contracts.CONTROL, "@ink", 0.45),
    ]
    traces += [
        _map_trace(cells[labels == name], name, color, 0.95, 6)
        for name, color in zip(top, COLORS, strict=False)
    ]
    return {"data": [trace for trace in traces if trace["x"]], "layout": _map_layout()}


def _map_by_category(cells: pd.DataFrame, column: str) -> Spec:
    values = cells[column].astype(object).where(cells[column].notna(), "unknown").astype(str)
    counts = values.value_counts()
    common = sorted(sorted(counts.index, key=lambda name: (-counts[name], name))[: len(COLORS)])
    traces = [
        _map_trace(cells[values == value], value, color) for value, color in zip(common, COLORS, strict=False)
    ]
    rest = ~values.isin(common)
    if rest.any():
        traces.insert(0, _map_trace(cells[rest], f"other ({values[rest].nunique()})", "@negative", 0.4))
    return {"data": traces, "layout": _map_layout()}


def _map_by_value(cells: pd.DataFrame, column: str, label: str) -> Spec:
    values = cells[column].astype(float)
    known = cells[values.notna()]
    shown = known[column].astype(float)
    logged = column == contracts.LIBRARY_SIZE
    trace = _map_trace(known, label, numbers(np.log10(shown.clip(lower=1)) if logged else shown, 4), 0.85)
    low, high = np.quantile(trace["marker"]["color"], [0.02, 0.98])
    bar: Spec = {"title": {"text": sentence(label), "side": "right"}, "thickness": 12, "outlinewidth": 0}
    if logged:
        ticks = [t for t in np.log10(np.outer(10.0 ** np.arange(7), [1, 2, 5])).ravel() if low <= t <= high]
        bar |= {"tickvals": numbers(ticks, 6), "ticktext": [format_count(round(10**t)) for t in ticks]}
    trace["marker"] |= {"colorscale": SCALE, "cmin": float(f"{low:.4g}"), "cmax": float(f"{high:.4g}"),
                        "colorbar": bar}  # fmt: skip
    trace["customdata"] = numbers(shown, 4)
    trace["hovertemplate"] = "%{text}<br>%{customdata:,} " + label + "<extra></extra>"
    return {"data": [trace], "layout": {**_map_layout(), "showlegend": False}}
