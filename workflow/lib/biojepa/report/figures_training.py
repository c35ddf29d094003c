"""Figures of the training and of the embedding: curves, collapse, a map of the cells."""

from __future__ import annotations

import math

import pandas as pd

from biojepa import contracts
from biojepa.report.figures import Caption, Figure, Spec, escape, evenly, numbers, sentence
from biojepa.report.glossary import model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import format_count

MAX_UMAP_CELLS = 6_000
MAX_CURVE_POINTS = 400
SET_STYLE = {
    "control": ("@negative", "control"),
    contracts.TRAIN: ("@baseline", "training"),
    contracts.VAL: ("@other", "validation"),
    contracts.TEST: ("@main", "held out (test)"),
}
CURVE_KEYS = ("stage", "step", "epoch", "seconds")
BATCH_COLORS = ("@c1", "@c2", "@c3", "@c4", "@c5", "@c6", "@c7")


def curve_figures(inputs: ReportInputs) -> list[Figure]:
    """Draw one panel per training statistic: loss first, then what would show a collapse."""
    columns: dict[str, None] = {}
    for history in inputs.histories.values():
        columns.update(dict.fromkeys(c for c in history.columns if c not in CURVE_KEYS))
    names = [c for c in _CURVE_TEXT if c in columns] + [c for c in columns if c not in _CURVE_TEXT]
    return [figure for name in names if (figure := _curve_figure(inputs, name)) is not None]


_PART = "a part of the training loss", "its level depends on its weight in the loss"
# Title, how to read the curve, and how it misleads.
_CURVE_TEXT = {
    "loss": ("Training loss", "should fall", "its level cannot be compared across stages or regularizers"),
    "val_loss": (
        "Validation loss",
        "should fall with the training loss; a rise is overfitting",
        "few validation perturbations make it noisy",
    ),
    "std_cells": (
        "Standard deviation over cells",
        "must stay away from 0, where every cell is the same point",
        "spread may come from batch or depth alone",
    ),
    "std_cells_student": (
        "Standard deviation over cells, student",
        "the same for the network that is trained, of which the embedding is a moving average",
        "spread may come from batch or depth alone",
    ),
    "std_cells_pooled": (
        "Standard deviation, pooled over tokens",
        "the same for the embedding averaged over tokens; must stay away from 0",
        "spread may come from batch or depth alone",
    ),
    "rankme": (
        "RankMe of pooled embeddings",
        "effective number of dimensions in use; a fall to 1 is a collapse",
        "noise fills dimensions too",
    ),
    "lidar": (
        "LiDAR, perturbations as classes",
        "effective number of dimensions that tell training perturbations apart",
        "training perturbations only; says nothing about unseen ones",
    ),
    "inv": ("Loss part: prediction error", *_PART),
    "var": ("Loss part: variance", *_PART),
    "cov": ("Loss part: covariance", *_PART),
    "sigreg": ("Loss part: SIGReg", *_PART),
    "val_loss_start": (
        "Validation loss of predicting no change",
        "the validation loss must fall below it",
        "a change of no length is a weak opponent",
    ),
}
_OTHER_CURVE = "a part of the loss or a setting of the optimizer", "its level has no meaning of its own"
CURVE_COLORS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7")
CURVE_DASHES = ("solid", "dash", "dot")
MAX_CURVE_MODELS = 4


def curve_key(inputs: ReportInputs) -> dict[str, list[tuple[str, str]]]:
    """Return what colours (models) and dashes (stages) of the curves mean, in CSS terms."""
    stages: dict[str, None] = {}
    for history in inputs.histories.values():
        stages.update(dict.fromkeys(history["stage"].astype(str) if "stage" in history else ()))
    models = shown_curves(inputs)
    css = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
    return {
        "models": [(m, CURVE_COLORS[i % len(CURVE_COLORS)]) for i, m in enumerate(models)],
        "stages": [(s, css[CURVE_DASHES[i % len(CURVE_DASHES)]]) for i, s in enumerate(stages)],
    }


def shown_curves(inputs: ReportInputs) -> list[str]:
    """Return the models whose curves are drawn: the model under test, then whole models, a few in all."""
    models = dict.fromkeys(model_of(run) for run in inputs.histories)
    order = sorted(models, key=lambda name: (name != inputs.lead_model, "_" in name))
    return order[:MAX_CURVE_MODELS]


def model_of(run: str) -> str:
    """Return the model of a run such as ``biojepa fold0 seed0``."""
    return run.split(" ", 1)[0]


def broken_at_restarts(
    steps: list[float | None], values: list[float | None]
) -> tuple[list[float | None], list[float | None]]:
    """Return a curve with a gap wherever its steps start again, so that no line runs backwards."""
    x: list[float | None] = []
    y: list[float | None] = []
    for at, (step, value) in enumerate(zip(steps, values, strict=True)):
        before = steps[at - 1] if at else None
        if before is not None and step is not None and step < before:
            x.append(None)
            y.append(None)
        x.append(step)
        y.append(value)
    return x, y


def _curve_figure(inputs: ReportInputs, column: str) -> Figure | None:
    key = curve_key(inputs)
    colors, stages = dict(key["models"]), [name for name, _ in key["stages"]]
    traces: list[Spec] = []
    for run, history in inputs.histories.items():
        if (
            model_of(run) not in colors
            or column not in history
            or not pd.api.types.is_numeric_dtype(history[column])
        ):
            continue
        rows = history.dropna(subset=[column])
        names = rows["stage"].astype(str) if "stage" in rows else pd.Series("", index=rows.index)
        for stage in names.unique():
            part = rows[names == stage]
            part = part.iloc[:: max(1, math.ceil(len(part) / MAX_CURVE_POINTS))]
            order = stages.index(stage) if stage in stages else 0
            x, y = broken_at_restarts(numbers(part["step"], 9), numbers(part[column], 5))
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(part) > 1 else "markers",
                    "name": escape(f"{run} {stage}".strip()),
                    "x": x,
                    "y": y,
                    "line": {
                        "color": f"@{colors[model_of(run)]}",
                        "dash": CURVE_DASHES[order % len(CURVE_DASHES)],
                        "width": 1.6,
                    },
                    "hovertemplate": "step %{x:,}: %{y:.4g}",
                }
            )
    if not traces:
        return None
    title, read, misleads = _CURVE_TEXT.get(column, (column, *_OTHER_CURVE))
    caption = Caption(
        title=title,
        shows=f"Column {column} of history.tsv by optimizer step.",
        read=f"{sentence(read)}.",
        n=f"lines {format_count(len(traces))}; "
        f"{len(colors)} of {len({model_of(run) for run in inputs.histories})} trained models are drawn",
        thresholds="none drawn",
        misleads=f"{sentence(misleads)}.",
    )
    layout = {
        "showlegend": False,
        "margin": {"t": 8, "r": 12, "b": 40, "l": 8},
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"automargin": True},
    }
    return Figure(f"curve-{column}", {"": {"data": traces, "layout": layout}}, caption, height=240)


def umap_figures(inputs: ReportInputs) -> list[Figure]:
    """Draw the embedding coloured by set, batch and, one at a time on demand, by perturbation."""
    if inputs.umap is None or inputs.umap.empty:
        return []
    table = inputs.umap
    runs = table["run"].astype(str) if "run" in table else pd.Series("", index=table.index)
    first = runs.iloc[0]
    total = int((runs == first).sum())
    cells = evenly(table[runs == first], MAX_UMAP_CELLS)
    options = {
        "held-out or trained": _umap_by_set(cells),
        "batch": _umap_by(cells, "batch", BATCH_COLORS),
        "perturbation (most cells)": _umap_by_perturbation(cells),
    }
    lead = model_text(inputs.lead_model, inputs.lead_model).label
    caption = Caption(
        title="Cells in the learned embedding",
        shows=f"UMAP of the pooled {lead} embedding of cells"
        + (f", {first}" if first else "")
        + "; held-out cells were encoded after training, which never saw them.",
        read="Perturbations should form regions of their own, batches should mix. The perturbation that is "
        "chosen in the table above is ringed.",
        n=f"{format_count(len(cells))} of {format_count(total)} mapped cells drawn; a map is a random sample "
        "of a large screen",
        thresholds="none; the axes have no unit",
        misleads="UMAP draws neighbourhoods, not distances: gaps and areas mean nothing, and most "
        "perturbations overlap control even in a perfect embedding. Judge it by the tables.",
    )
    return [Figure("umap", options, caption, height=540, selector="Colour by")]


def _umap_trace(rows: pd.DataFrame, name: str, color: str, opacity: float = 0.65) -> Spec:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": numbers(rows["umap_1"], 4),
        "y": numbers(rows["umap_2"], 4),
        "marker": {"size": 4, "color": color, "opacity": opacity},
        "text": [escape(p) for p in rows[contracts.PERTURBATION]],
        "hovertemplate": "%{text}",
    }


def _umap_layout() -> Spec:
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False}
    return {
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
        "xaxis": {**bare, "title": {"text": "UMAP 1"}},
        "yaxis": {**bare, "title": {"text": "UMAP 2"}, "scaleanchor": "x"},
    }


def _umap_by_set(cells: pd.DataFrame) -> Spec:
    is_control = cells[contracts.PERTURBATION] == contracts.CONTROL
    sets = cells[contracts.SET].astype(object).where(~is_control, "control").fillna("other")
    known = [name for name in SET_STYLE if (sets == name).any()]
    other = sorted(set(sets) - set(known))
    traces = [_umap_trace(cells[sets == name], SET_STYLE[name][1], SET_STYLE[name][0]) for name in known]
    traces += [_umap_trace(cells[sets == name], str(name), "@ablation") for name in other]
    return {"data": traces, "layout": _umap_layout()}


def _umap_by(cells: pd.DataFrame, column: str, colors: tuple[str, ...]) -> Spec:
    values = cells[column].astype(object).where(cells[column].notna(), "unknown").astype(str)
    common = list(values.value_counts(sort=True).index[: len(colors)])
    traces = [
        _umap_trace(cells[values == value], f"{column} {value}", color)
        for value, color in zip(sorted(common), colors, strict=False)
    ]
    rest = ~values.isin(common)
    if rest.any():
        traces.insert(0, _umap_trace(cells[rest], f"other ({values[rest].nunique()})", "@negative", 0.4))
    return {"data": traces, "layout": _umap_layout()}


def _umap_by_perturbation(cells: pd.DataFrame) -> Spec:
    labels = cells[contracts.PERTURBATION].astype(str)
    tested = labels[(cells[contracts.SET] == contracts.TEST) & (labels != contracts.CONTROL)]
    counts = tested.value_counts()
    top = sorted(counts.index, key=lambda name: (-counts[name], name))[: len(BATCH_COLORS)]
    rest = ~labels.isin(top)
    traces = [_umap_trace(cells[rest], "all other cells", "@negative", 0.25)]
    traces += [
        _umap_trace(cells[labels == name], name, color, 0.9)
        for name, color in zip(top, BATCH_COLORS, strict=False)
    ]
    return {"data": traces, "layout": _umap_layout()}
