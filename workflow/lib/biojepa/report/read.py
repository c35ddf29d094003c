"""Read the files of an evaluation into what a report shows, one predictions file at a time."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anndata
import h5py
import numpy as np
import pandas as pd

from biojepa import contracts
from biojepa.errors import InputError
from biojepa.files import read_tsv
from biojepa.labels import genes_of
from biojepa.report.inputs import NORM_COLUMNS, Profile, ReportInputs, require_columns

logger = logging.getLogger(__name__)
MAX_PROFILE_GENES, MIN_PROFILE_GENES = 200, 15
# Numbers in all profiles together: at about seven bytes each they take 1 MB of the page.
PROFILE_BUDGET = 150_000


@dataclass(frozen=True)
class Run:
    """One run of a model: what ``{model}``, ``{fold}`` and ``{seed}`` were."""

    model: str
    fold: int
    seed: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> Run:
        """Make a run from a record with ``model``, ``fold`` and ``seed``."""
        return cls(str(record["model"]), int(record["fold"]), int(record["seed"]))

    def __str__(self) -> str:
        return f"{self.model} fold{self.fold} seed{self.seed}"


@dataclass(frozen=True)
class ReportFiles:
    """Where the parts of a report lie; runs are in the order of the files they describe."""

    metrics: Path
    summary: Path
    enrichment: Path
    verdict: Path
    observed: Path
    splits: list[Path]
    qc: Path
    perturbations: Path
    predictions: list[Path] = field(default_factory=list)
    prediction_runs: list[Run] = field(default_factory=list)
    histories: list[Path] = field(default_factory=list)
    train_metrics: list[Path] = field(default_factory=list)
    history_runs: list[Run] = field(default_factory=list)
    umaps: list[Path] = field(default_factory=list)
    coverage: list[Path] = field(default_factory=list)
    strata: Path | None = None
    trust: Path | None = None
    representation: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        for files, runs, name in (
            (self.predictions, self.prediction_runs, "predictions"),
            (self.histories, self.history_runs, "histories"),
        ):
            if len(files) != len(runs):
                raise InputError(
                    f"report, {name}", f"{len(files)} files and {len(runs)} runs", "one run per file",
                    "list model, fold and seed in the order of the files",
                )  # fmt: skip


def read_report(
    files: ReportFiles,
    dataset: str,
    split: str,
    settings: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    page: Path | None = None,
    qc_page: str = "",
) -> ReportInputs:
    """Read everything that a report shows.

    Parameters
    ----------
    files
        The files and the runs they belong to.
    dataset, split
        Names for the title.
    settings, provenance
        Shown as they are under *Methods*.
    page
        Where the report will lie; links to the tables are relative to it.
    qc_page
        Address of the page of quality control, relative to the report; empty where there is none.

    Returns
    -------
    ReportInputs
        Profiles are limited to the genes that change most (at most 200 per perturbation, fewer for
        thousands of perturbations).

    Raises
    ------
    InputError
        When a table lacks a column or predictions hold genes that the truth does not.
    """
    metrics, summary = _table(files.metrics), _table(files.summary)
    verdict = json.loads(files.verdict.read_text(encoding="utf-8"))
    splits = [json.loads(path.read_text(encoding="utf-8")) for path in files.splits]
    enrichment = _table(files.enrichment) if files.enrichment.stat().st_size else pd.DataFrame()
    if enrichment.empty:
        enrichment = pd.DataFrame(columns=list(contracts.ENRICHMENT_COLUMNS))
    require_columns(summary, contracts.SUMMARY_COLUMNS, str(files.summary))
    main_model = str(verdict.get("model") or "biojepa")
    truth = anndata.read_h5ad(files.observed)
    shown = _profile_models(summary, main_model)
    norms, changes = _compare(truth, files, shown)
    machines, targets = _origins(files)
    inputs = ReportInputs(
        dataset=dataset,
        split=split,
        metrics=metrics,
        summary=summary,
        enrichment=enrichment,
        verdict=verdict,
        splits=splits,
        qc=_table(files.qc),
        perturbations=_table(files.perturbations),
        strata=_table(files.strata) if files.strata else None,
        trust=_table(files.trust) if files.trust else None,
        umap=_stacked(files.umaps),
        coverage=_stacked(files.coverage),
        representation=_stacked(files.representation),
        histories={
            str(run): _table(path) for run, path in zip(files.history_runs, files.histories, strict=True)
        },
        train_metrics={
            str(run): json.loads(path.read_text(encoding="utf-8"))
            for run, path in zip(files.history_runs, files.train_metrics, strict=False)
        },
        profiles=_profiles(truth, changes, shown),
        norms=norms,
        machines=machines,
        linear_targets=targets,
        provenance=provenance or {},
        settings=settings or {},
        sentinels=[*verdict.get("sentinels", []), *_sentinels(truth, metrics, splits, files)],
        downloads=_downloads(files, page) if page else [],
        main_model=main_model,
        qc_page=qc_page,
    )
    logger.info("%s, %s: %d models, %d profiles", dataset, split, len(inputs.models), len(inputs.profiles))
    return inputs


def _table(path: Path) -> pd.DataFrame:
    return read_tsv(path)


def _stacked(paths: list[Path]) -> pd.DataFrame | None:
    return pd.concat([_table(path) for path in paths], ignore_index=True) if paths else None


def _profile_models(summary: pd.DataFrame, main_model: str) -> list[str]:
    """Return the models whose predictions are shown gene by gene: main, best baseline, duplicate."""
    pooled = summary[summary["category"] == contracts.ALL_CATEGORIES]
    best = pooled["best_baseline"].dropna()
    wanted = [main_model, *best.mode().astype(str).tolist()[:1], "duplicate"]
    present = set(pooled["model"])
    found = [name for name in dict.fromkeys(wanted) if name in present]
    return found or list(pooled["model"].iloc[:1])


def fold_reference(truth: anndata.AnnData, slot: str, fold: int) -> np.ndarray:
    """Return the perturbed or control mean of a fold over all genes of the truth, shape ``(genes,)``.

    Raises
    ------
    InputError
        When the slot is missing or its length is not the number of genes.
    """
    stored = truth.uns.get(slot)
    if isinstance(stored, dict):
        stored = stored.get(f"fold{fold}", stored.get(str(fold)))
    values = None if stored is None else np.asarray(stored, dtype=float).ravel()
    if values is None or len(values) != truth.n_vars:
        raise InputError(
            f"observed.h5ad, uns['{slot}'], fold {fold}",
            "nothing" if values is None else f"{len(values)} values",
            f"{truth.n_vars} values, one per gene",
            "rerun the rule evaluate",
        )
    return values


def _compare(
    truth: anndata.AnnData, files: ReportFiles, shown: list[str]
) -> tuple[pd.DataFrame, dict[tuple[int, str], dict[str, np.ndarray]]]:
    """Return effect sizes of every model, and the predicted means of the shown models by fold and label.

    Sizes are Euclidean norms of the change against the training perturbed mean, over the genes of
    the fold, averaged over folds and seeds; means are averaged over seeds.
    """
    folds = truth.obs["fold"].astype(int)
    rows = {
        key: at
        for at, key in enumerate(zip(folds, truth.obs[contracts.PERTURBATION].astype(str), strict=True))
    }
    norms: list[pd.DataFrame] = []
    sums: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    seeds: dict[tuple[int, str], dict[str, int]] = {}
    for run, path in zip(files.prediction_runs, files.predictions, strict=True):
        names, predicted = _test_predictions(path, truth.var_names)
        known = [at for at, name in enumerate(names) if (run.fold, name) in rows]
        names, predicted = names[known], predicted[known]
        reference = fold_reference(truth, "perturbed_mean", run.fold)
        observed = np.asarray(truth.X[[rows[run.fold, name] for name in names]], dtype=float)
        use = np.isfinite(observed) & np.isfinite(predicted) & np.isfinite(reference)
        sizes = [
            np.sqrt((np.where(use, values - reference, 0.0) ** 2).sum(axis=1))
            for values in (observed, predicted)
        ]
        norms.append(
            pd.DataFrame(
                {"model": run.model, "perturbation": names, "observed": sizes[0], "predicted": sizes[1]}
            )
        )
        for name, profile in zip(names, predicted, strict=True) if run.model in shown else ():
            key = (run.fold, name)
            before = sums.setdefault(key, {}).get(run.model, np.zeros(1, dtype=np.float32))
            sums[key][run.model] = before + profile
            seeds.setdefault(key, {})[run.model] = seeds.get(key, {}).get(run.model, 0) + 1
    means = {key: {m: total / seeds[key][m] for m, total in models.items()} for key, models in sums.items()}
    table = pd.concat(norms, ignore_index=True) if norms else pd.DataFrame(columns=list(NORM_COLUMNS))
    keys, both = ["model", "perturbation"], ["observed", "predicted"]
    return table.groupby(keys, sort=True, as_index=False)[both].mean(), means


def _test_predictions(path: Path, genes: pd.Index) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predicted means ``(perturbations, genes)`` of the test rows, NaN where not predicted.

    Raises
    ------
    InputError
        When the file has genes that the truth does not.
    """
    # Predicted single cells, which may lie in the same file, are not read.
    with h5py.File(path, "r") as file:
        obs, predicted = (anndata.io.read_elem(file[name]) for name in ("obs", "X"))
        names = anndata.io.read_elem(file["var"]).index.astype(str)
    tested = (obs[contracts.SET].astype(str) == contracts.TEST).to_numpy()
    columns = genes.get_indexer(names)
    if (columns < 0).any():
        strangers = ", ".join(names[columns < 0][:5])
        raise InputError(
            path,
            f"genes unknown to the truth, such as {strangers}",
            "the genes of the fold",
            "rerun embed for this model, then evaluate",
        )
    values = np.full((int(tested.sum()), len(genes)), np.nan, dtype=np.float32)
    values[:, columns] = np.asarray(predicted)[tested]
    return obs.loc[tested, contracts.PERTURBATION].astype(str).to_numpy(), values


def _origins(files: ReportFiles) -> tuple[dict[str, list[str]], tuple[int, int] | None]:
    """Read from the predictions where each model was fitted, and what ``linear`` had to go by.

    Returns
    -------
    machines
        Of each model, in the order of its runs; models made elsewhere and files without a record have none.
    linear_targets
        Held-out perturbations with a measured target gene in every fold, and how many there are; None
        where no file tells.
    """
    machines: dict[str, list[str]] = {}
    tested: set[str] = set()
    without: set[str] = set()
    for run, path in zip(files.prediction_runs, files.predictions, strict=True):
        with h5py.File(path, "r") as file:
            stored = anndata.io.read_elem(file["uns/provenance"]) if "uns/provenance" in file else "{}"
            record = json.loads(str(stored))
            if contracts.WITHOUT_TARGET in record:
                obs = anndata.io.read_elem(file["obs"])
                held_out = obs[contracts.SET].astype(str) == contracts.TEST
                tested |= set(obs.loc[held_out, contracts.PERTURBATION].astype(str))
                without |= set(record[contracts.WITHOUT_TARGET])
        if record.get("machine") and not record.get("made_elsewhere"):
            found = machines.setdefault(run.model, [])
            found += [record["machine"]] if record["machine"] not in found else []
    return machines, (len(tested - without), len(tested)) if tested else None


def _profiles(
    truth: anndata.AnnData, changes: dict[tuple[int, str], dict[str, np.ndarray]], shown: list[str]
) -> dict[str, Profile]:
    """Return the profile of each perturbation in its first fold.

    Of more perturbations than fit, those with the largest observed change are kept.
    """
    folds = truth.obs["fold"].astype(int).to_numpy()
    names = truth.obs[contracts.PERTURBATION].astype(str).to_numpy()
    genes = truth.var_names.to_numpy().astype(str)
    delta = np.asarray(truth.X, dtype=float)
    for fold in sorted(set(folds)):
        delta[folds == fold] -= fold_reference(truth, "perturbed_mean", fold)
    first: dict[str, int] = {}
    for position, (fold, name) in enumerate(zip(folds, names, strict=True)):
        if (fold, name) in changes:
            first.setdefault(name, position)
    per_gene = len(shown) + 2
    length = np.sqrt(np.nansum(delta**2, axis=1))
    kept = sorted(first, key=lambda name: -length[first[name]])[
        : PROFILE_BUDGET // (MIN_PROFILE_GENES * per_gene)
    ]
    limit = min(MAX_PROFILE_GENES, PROFILE_BUDGET // (max(len(kept), 1) * per_gene))
    profiles = {}
    for name in kept:
        position = first[name]
        fold = int(folds[position])
        models = changes[fold, name]
        reference = fold_reference(truth, "perturbed_mean", fold)
        predicted = {model: models[model] - reference for model in shown if model in models}
        chosen = _telling_genes(delta[position], next(iter(predicted.values())), genes, name, limit)
        profiles[name] = Profile(
            fold,
            genes[chosen].tolist(),
            delta[position][chosen].tolist(),
            {model: values[chosen].tolist() for model, values in predicted.items()},
        )
    return profiles


def _telling_genes(
    observed: np.ndarray, predicted: np.ndarray, genes: np.ndarray, name: str, limit: int
) -> np.ndarray:
    """Return positions of the genes that change most, observed or predicted, and of the perturbed genes.

    Ordered by observed change; genes that the fold does not use are left out.
    """
    size = np.fmax(np.abs(observed), np.abs(predicted))
    size[~(np.isfinite(observed) & np.isfinite(predicted))] = -1.0
    size[np.isin(genes, genes_of(name)) & (size >= 0)] = np.inf
    order = np.argsort(-size, kind="stable")[:limit]
    order = order[size[order] >= 0]
    return order[np.argsort(-np.abs(observed[order]), kind="stable")]


def _sentinels(
    truth: anndata.AnnData, metrics: pd.DataFrame, splits: list[dict[str, Any]], files: ReportFiles
) -> list[dict[str, Any]]:
    """Check the files of the report against each other."""
    truths = {
        (int(f), str(p)) for f, p in zip(truth.obs["fold"], truth.obs[contracts.PERTURBATION], strict=True)
    }
    single = metrics[metrics["perturbation"] != contracts.WHOLE_MODEL]
    scored = {(int(f), str(p)) for f, p in zip(single["fold"], single["perturbation"], strict=True)}
    strangers = sorted(scored - truths)
    checks = [
        {
            "check": "only perturbations held out in a fold are scored in that fold",
            "passed": not strangers,
            "detail": f"{len(scored)} fold and perturbation pairs"
            + (f"; not held out: {strangers[:5]}" if strangers else ""),
        }
    ]
    expected = sum(int(item["n_test"]) for item in splits if "n_test" in item)
    if expected:
        checks.append(
            {
                "check": "every held-out perturbation of every split has a truth",
                "passed": expected == len(truths),
                "detail": f"{len(truths)} of {expected}",
            }
        )
    by_fold: dict[int, set[str]] = {}
    for run in files.prediction_runs:
        by_fold.setdefault(run.fold, set()).add(run.model)
    if by_fold:
        uneven = {fold: len(models) for fold, models in sorted(by_fold.items())}
        checks.append(
            {
                "check": "every fold is predicted by the same models",
                "passed": len({frozenset(models) for models in by_fold.values()}) == 1,
                "detail": ", ".join(f"fold {fold}: {count}" for fold, count in uneven.items()),
            }
        )
    return checks


def _downloads(files: ReportFiles, page: Path) -> list[dict[str, str]]:
    """Return relative links to the tables behind the page, quoted, since names may hold ``%`` or ``#``."""
    listed = [files.metrics, files.summary, files.enrichment, files.verdict, files.observed]
    listed += [path for path in (files.strata, files.trust) if path]
    listed += [files.qc, files.perturbations, *files.coverage, *files.histories]
    listed += [*files.representation, *files.predictions]
    links = []
    for path in listed:
        relative = Path(os.path.relpath(path, page.parent)).as_posix()
        links.append({"label": relative.removeprefix("../"), "href": quote(relative)})
    # Two results of the same run that are made with this page and after it.
    links.append({"label": "report/headline.tsv", "href": "report/headline.tsv"})
    links.append({"label": "provenance.json", "href": "../../provenance.json"})
    return links
