"""How the numbers were made: a paragraph for a paper, run times, provenance and the files behind the page."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from biojepa import contracts
from biojepa.evaluation.settings import SIMPLE_BASELINES
from biojepa.report.glossary import SCHEME_TEXTS, metric_text, model_text
from biojepa.report.inputs import ReportInputs
from biojepa.report.tables import MISSING, format_count, format_level

# Names of the files of single runs: hundreds of them, listed behind the tables.
_RUN_FILES = {
    "predictions.h5ad": "Predictions of single runs",
    "history.tsv": "Training curves of single runs",
}


def plain_value(value: Any) -> str:
    """Return a value of a provenance record as text: numbers as they are, nested content as JSON."""
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return str(value)


def key_values(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested records to ``section · key`` and text, in the order in which they were written."""
    pairs: list[tuple[str, str]] = []
    for key, value in record.items():
        name = f"{prefix} · {key}" if prefix else str(key)
        if isinstance(value, dict):
            pairs += key_values(value, name)
        else:
            pairs.append((name, plain_value(value)))
    return pairs


def methods_text(inputs: ReportInputs) -> list[str]:
    """Return sentences that describe the evaluation, to be pasted into a paper as one paragraph.

    A sentence whose facts were not recorded is left out.
    """
    return [
        text
        for text in (
            _held_out(inputs),
            _scheme(inputs),
            "Each prediction was compared with the mean log expression of one half of the cells of the "
            "perturbation; the other half served as technical duplicate.",
            _metrics(inputs),
            _statistics(inputs),
            _linear(inputs),
            _software(inputs),
            _hardware(inputs),
            _machines(inputs),
        )
        if text
    ]


def _held_out(inputs: ReportInputs) -> str:
    tested = inputs.metrics.loc[inputs.metrics["perturbation"] != contracts.WHOLE_MODEL, "perturbation"]
    lead = model_text(inputs.lead_model, inputs.lead_model).label
    own = inputs.metrics[inputs.metrics["model"] == inputs.lead_model]
    text = (
        f"{lead} ({inputs.lead_model}) was evaluated on "
        f"{_counted(tested.nunique(), 'held-out perturbation')} of the dataset {inputs.dataset}, "
        f"split by the scheme {inputs.split} into "
        f"{_counted(len(inputs.splits) or own['fold'].nunique(), 'fold')}"
    )
    seeds = sorted({str(item["seed"]) for item in inputs.splits if "seed" in item})
    if seeds:
        text += f" (seed {', '.join(seeds)})"
    trained = sorted(int(seed) for seed in own["seed"].unique())
    return f"{text}, with training seed {', '.join(map(str, trained))}." if trained else f"{text}."


def _scheme(inputs: ReportInputs) -> str:
    """Say what the scheme holds out, by which protocol, and what it left out."""
    text = SCHEME_TEXTS.get(inputs.split, "")
    protocols = sorted({str(item["protocol"]) for item in inputs.splits if "protocol" in item})
    if protocols:
        text += f" The protocol was {', '.join(protocols)}."
    contexts = [str(item[contracts.CONTEXT]) for item in inputs.splits if contracts.CONTEXT in item]
    if contexts:
        columns = sorted({str(item.get(contracts.CONTEXT_COLUMN)) for item in inputs.splits})
        text += f" Contexts held out in turn, by {', '.join(columns)}: {', '.join(contexts)}."
    elsewhere = sum(len(item.get(contracts.VALIDATION_ELSEWHERE, ())) for item in inputs.splits)
    too_few = sum(len(item.get(contracts.LEFT_OUT, ())) for item in inputs.splits) - elsewhere
    if too_few:
        text += f" {_counted(too_few, 'label')} with too few cells in a context took no part."
    if elsewhere:
        text += (
            f" {_counted(elsewhere, 'label')} took no part because the same perturbation served for "
            "validation in another context."
        )
    return text


def _metrics(inputs: ReportInputs) -> str:
    def listed(names: list[str]) -> str:
        return ", ".join(f"{metric_text(name).label} ({name})" for name in names)

    usable = [name for name in inputs.headline_metrics if inputs.usable(name)]
    unusable = [name for name in inputs.headline_metrics if not inputs.usable(name)]
    text = f"Headline metrics were {listed(usable)}." if usable else ""
    if unusable:
        text += (
            f" {listed(unusable)} {'was' if len(unusable) == 1 else 'were'} not used, since the interval of "
            "the difference between duplicate and training mean included 0."
        )
    return text.strip()


def _statistics(inputs: ReportInputs) -> str:
    settings = inputs.settings.get("evaluate", {})
    level, draws = settings.get("confidence"), settings.get("draws")
    how = f"{format_level(level)} intervals" if level is not None else "Intervals"
    text = f"{how} are percentiles of "
    text += f"{format_count(draws)} bootstrap draws" if draws is not None else "bootstrap draws"
    text += " over perturbations"
    if inputs.metrics.groupby("model")["seed"].nunique().max() > 1:
        text += " and, within folds, over training seeds"
    text += f" (seed {settings['seed']})." if "seed" in settings else "."
    present = set(inputs.models) - {inputs.lead_model}
    simple = [name for name in settings.get("baselines", SIMPLE_BASELINES) if name in present]
    if simple:
        labels = ", ".join(model_text(str(name)).label for name in simple)
        text += (
            f" The model was compared with the best of {_counted(len(simple), 'simple baseline')} "
            f"({labels}), chosen on the test scores, by a paired Wilcoxon signed-rank test over "
            "perturbations with Benjamini–Hochberg correction over models and metrics of a category, legacy "
            "metrics apart."
        )
    return text


def _software(inputs: ReportInputs) -> str:
    packages = inputs.provenance.get("packages") or inputs.provenance.get("versions") or {}
    parts = [f"{name} {version}" for name, version in packages.items()]
    commit = inputs.provenance.get("commit")
    text = f"Computed with the BioJEPA pipeline at commit {commit}" if commit else "Computed"
    if parts:
        text += f", with {', '.join(parts)}"
    return f"{text}." if commit or parts else ""


def _hardware(inputs: ReportInputs) -> str:
    times = run_times(inputs)
    lead = next((row for row in times if row["model"] == inputs.lead_model), None)
    if lead is None:
        return ""
    label = model_text(inputs.lead_model, inputs.lead_model).label
    text = f"{_counted(lead['runs'], 'training')} of {label} took {lead['total']} in all"
    return f"{text} on {lead['device']}." if lead["device"] != MISSING else f"{text}."


def _machines(inputs: ReportInputs) -> str:
    """Say where every model was fitted, simple ones and controls included, and on which GPU if on one."""
    found = {name: list(machines) for name, machines in inputs.machines.items()}
    # Of a training, the file of predictions tells where it was embedded.
    trained: dict[str, list[str]] = {}
    for run, record in inputs.train_metrics.items():
        if record.get("machine"):
            device = str(record.get("device", "cpu"))
            place = str(record["machine"]) + ("" if device.startswith("cpu") else f", {device}")
            trained.setdefault(run.split(" ", 1)[0], []).append(place)
    found.update(trained)
    models: dict[str, list[str]] = {}
    for name in sorted(found):
        models.setdefault(" or ".join(sorted(set(found[name]))), []).append(name)
    if not models:
        return ""
    if len(models) == 1:
        place = next(iter(models))
        return f"All models of the pipeline, simple ones and controls included, were fitted on {place}."
    ordered = sorted(models.items(), key=lambda item: (-len(item[1]), item[0]))
    listed = [f"{', '.join(names)} on {place}" for place, names in ordered[1:]]
    return f"Models of the pipeline were fitted on {ordered[0][0]}; but {'; '.join(listed)}."


def _linear(inputs: ReportInputs) -> str:
    """Say how many held-out perturbations the model ``linear`` has anything to go by."""
    if inputs.linear_targets is None:
        return ""
    known, count = inputs.linear_targets
    return (
        f"{model_text('linear').label} predicts from the target genes that are measured, of which "
        f"{format_count(known)} of {_counted(count, 'held-out perturbation')} "
        f"{'has' if known == 1 else 'have'} any; it gives the others the training mean."
    )


def _counted(count: int, name: str) -> str:
    return f"{format_count(count)} {name}{'' if count == 1 else 's'}"


def run_times(inputs: ReportInputs) -> list[dict[str, Any]]:
    """Return what the trainings of each model took, from the records that the trainings wrote.

    Returns
    -------
    list of dict
        ``model``, ``runs``, ``device``, and as text ``total`` and ``longest`` wall time and the highest
        ``memory``; the model under test first.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for run, record in inputs.train_metrics.items():
        if "seconds" in record:
            records.setdefault(run.split(" ", 1)[0], []).append(record)
    rows = []
    for model in sorted(records, key=lambda name: name != inputs.lead_model):
        seconds = [float(record["seconds"]) for record in records[model]]
        memory = [float(r["peak_memory_mb"]) for r in records[model] if r.get("peak_memory_mb") is not None]
        devices = dict.fromkeys(_device(record) for record in records[model])
        rows.append(
            {
                "model": model,
                "runs": len(seconds),
                "device": ", ".join(filter(None, devices)) or MISSING,
                "total": duration(sum(seconds)),
                "longest": duration(max(seconds)),
                "memory": f"{format_count(max(memory))} MB" if memory else MISSING,
            }
        )
    return rows


def _device(record: dict[str, Any]) -> str:
    """Return device and threads of a training, such as ``cpu (x86_64), 1 thread``."""
    device = str(record.get("device", ""))
    threads = record.get("torch_threads")
    return f"{device}, {_counted(int(threads), 'thread')}" if device and threads else device


def duration(seconds: float) -> str:
    """Return a wall time in the unit that suits it: ``41.2 s``, ``12 min``, ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def run_tables(inputs: ReportInputs) -> list[dict[str, Any]]:
    """Lay the numbers of the trainings side by side, those of the model under test apart from the others.

    Versions and settings are the same for all runs and stand under provenance and configuration.

    Returns
    -------
    list of dict
        ``title``, ``runs`` and ``rows`` (name and one text per run); empty tables are left out.
    """
    runs = inputs.train_metrics
    own = {name: runs[name] for name in runs if name.split(" ", 1)[0] == inputs.lead_model}
    others = {name: runs[name] for name in runs if name not in own}
    lead = model_text(inputs.lead_model, inputs.lead_model).label
    titled = ((f"Trainings of {lead}", own), (f"The other {len(others)} trainings", others))
    tables = [{"title": title, **_side_by_side(part)} for title, part in titled]
    return [table for table in tables if table["rows"]]


def _side_by_side(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    flat = {
        run: dict(key_values({k: v for k, v in numbers.items() if k not in ("packages", "settings")}))
        for run, numbers in runs.items()
    }
    keys = list(dict.fromkeys(key for numbers in flat.values() for key in numbers))
    rows = [(key.replace("_", " "), [numbers.get(key, MISSING) for numbers in flat.values()]) for key in keys]
    return {"runs": list(flat), "rows": rows}


def file_groups(downloads: list[dict[str, str]]) -> list[tuple[str, list[dict[str, str]]]]:
    """Sort the links into the tables of the evaluation, under an empty title, and files of single runs."""
    groups: dict[str, list[dict[str, str]]] = {"": []}
    for item in downloads:
        groups.setdefault(_RUN_FILES.get(item["label"].rsplit("/", 1)[-1], ""), []).append(item)
    return [(title, items) for title, items in groups.items() if items]
