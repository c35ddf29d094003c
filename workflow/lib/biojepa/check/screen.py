"""What the tables of one screen say: cells, labels, controls, batches and folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from biojepa.check.problems import Problems
from biojepa.config import Config
from biojepa.contracts import BATCH, CELL_TYPE, CONTROL, GUIDE_ID, PERTURBATION, SET, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.labels import control_names, genes_of, is_combination, normalize_label
from biojepa.pairing import PairSettings, hold_out
from biojepa.preprocess.annotate import (
    STATUS,
    CellSums,
    batches_of,
    cell_types_of,
    guide_targets,
    is_mitochondrial,
    label_cells,
    library_sizes,
    mitochondrial_percent,
    needs_guide_counts,
)
from biojepa.preprocess.cell_labels import other_controls, unsplit_labels
from biojepa.preprocess.quality import Funnel, filter_small_perturbations
from biojepa.preprocess.settings import PreprocessSettings
from biojepa.raw.read import RawScreen, open_screen
from biojepa.raw.source import ScreenSource
from biojepa.raw.tables import require_column

# Labels, batches and the like that a report lists.
LISTED = 10
LABELS, GUIDES, CALLS, COUNTS = "labels", "guide column", "guide calls", "guide counts"
EARLIER, UNKNOWN = "earlier run", "unknown"


@dataclass
class Screen:
    """What is known of a screen before it is preprocessed.

    Attributes
    ----------
    facts
        For the report: numbers, text, lists and dicts of these alone.
    obs
        Cells that have a label and whose perturbation has enough cells: ``perturbation``, ``batch`` and
        ``cell_type``; None where labels are not known yet.
    measured
        Symbols of the genes that the screen measures, none where its file is not there.
    targets
        Genes that the guides target, or that labels name as far as they are understood; used where ``obs``
        is None.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    obs: pd.DataFrame | None = None
    measured: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    @property
    def perturbed_genes(self) -> list[str]:
        """Genes that it perturbs, sorted."""
        if self.obs is None:
            return sorted(self.targets)
        return sorted({gene for label in self.obs[PERTURBATION].unique() for gene in genes_of(label)})

    @property
    def singles(self) -> set[str]:
        """Genes that it perturbs on their own."""
        if self.obs is None:
            return set(self.targets)
        return {label for label in self.obs[PERTURBATION] if label != CONTROL and not is_combination(label)}


def look_at_screen(config: Config, dataset: str, problems: Problems) -> Screen:
    """Read the tables of a screen, and say what they mean.

    Parameters
    ----------
    config
        The checked config.
    dataset
        Name of its row.
    problems
        Gets what is wrong; nothing is raised for it.
    """
    row, screen = config.source(dataset), Screen()
    path = Path(row.path)
    if not path.exists():
        missing = "source" in dict(row.missing_files())
        will_be = "will be simulated" if row.is_simulated else "not there yet"
        screen.facts["state"] = "missing" if missing else will_be
        if row.is_simulated:
            asked = config.settings(dataset, "download")["simulator"]
            names = ("n_cells", "n_genes", "n_singles", "n_combinations", "n_batches")
            screen.facts["simulated"] = {name: asked[name] for name in names}
        _from_earlier_run(dataset, screen, problems)
        return screen
    screen.facts["state"] = "read"
    with problems.caught(dataset, f"config, preprocess of {dataset}"):
        source = ScreenSource.from_mapping(row.screen)
        settings = PreprocessSettings.from_mapping(config.settings(dataset, "preprocess"))
        with problems.caught(dataset, row.path), open_screen(source, tables_only=True) as opened:
            screen.measured = [str(name) for name in opened.var.index]
            screen.facts |= {
                "cells": opened.n_cells,
                "genes": len(opened.var),
                "guides": 0 if opened.guide_names is None else len(opened.guide_names),
                "notes": list(opened.notes),
                "left_out": {why: n for n, why in opened.left_out.values()},
            }
            _look_at_cells(opened, source, settings, dataset, screen, problems)
    if screen.obs is None and screen.facts.get("labels_from") in (None, COUNTS):
        _from_earlier_run(dataset, screen, problems)
    return screen


def _look_at_cells(
    opened: RawScreen,
    source: ScreenSource,
    settings: PreprocessSettings,
    dataset: str,
    screen: Screen,
    problems: Problems,
) -> None:
    """Say what labels, batches and columns of numbers mean; each on its own, so that all problems show."""
    facts, obs = screen.facts, pd.DataFrame(index=opened.obs.index)
    # Sums over genes would need the counts; columns of numbers are read in spite of that.
    none = np.zeros(opened.n_cells)
    nothing = CellSums(none, none, none, sparse.csr_matrix((opened.n_cells, 0)))
    with problems.caught(dataset, "batch_column"):
        obs[BATCH] = batches_of(opened, source)
        facts["batches_by"] = source.batch_column or opened.sample_column
    with problems.caught(dataset, "cell_type_column"):
        obs[CELL_TYPE] = cell_types_of(opened.obs, source)
    mitochondrial = opened.var.index[is_mitochondrial(opened)]
    facts["depth_from"] = source.library_size_column
    facts["mito_from"], facts["mito_genes"] = source.mito_column, [str(gene) for gene in mitochondrial]
    with problems.caught(dataset, "library_size_column"):
        library_sizes(opened.obs, nothing.n_counts, source)
    with problems.caught(dataset, "mito_column"):
        if source.mito_column:
            mitochondrial_percent(opened, nothing, source)

    labels = None
    if needs_guide_counts(opened, source):
        facts["labels_from"], facts["method"] = COUNTS, settings.guide_assignment.method
        with problems.caught(dataset, "guides"):
            _look_at_guides(opened.guide_names, source, screen)
    elif not source.perturbation_column and opened.called_guides is not None:
        facts["labels_from"], facts["calls"] = CALLS, source.guide_calls
        with problems.caught(dataset, "guide_calls"):
            _look_at_guides(opened.called_names, source, screen)
            called = label_cells(opened, source, settings.guide_assignment).obs
            labels = called[PERTURBATION]
            raw = called[GUIDE_ID].where(labels.notna(), called[STATUS])
            facts["labels"] = _listing_of(raw.tolist(), labels.tolist())
    else:
        facts["labels_from"] = LABELS if source.perturbation_column else GUIDES
        if source.perturbation_column and source.perturbation_column in opened.obs:
            facts["labels"], understood = _mapping(opened.obs[source.perturbation_column], source)
            # Sources are asked for these, also where other labels are not understood.
            screen.targets = sorted({gene for label in understood for gene in genes_of(label)})
        with problems.caught(dataset, "perturbation_column"):
            labels = label_cells(opened, source, settings.guide_assignment).obs[PERTURBATION]
            if source.perturbation_column:
                facts["join"], facts["unsplit"] = unsplit_labels(labels.to_numpy())
        if not source.perturbation_column and source.guide_column in opened.obs and labels is not None:
            raw = require_column(opened.obs, source.guide_column, source.columns_in, "guide_column")
            facts["labels"] = _listing_of(raw.astype(object).tolist(), labels.tolist())
    if BATCH in obs:
        facts["batches"] = _counted(obs[BATCH])
    if CELL_TYPE in obs:
        facts["cell_types"] = _counted(obs[CELL_TYPE])
    if labels is None:
        return
    obs[PERTURBATION] = labels.to_numpy()
    _count_perturbations(obs, settings, source, dataset, screen, problems)
    if BATCH in obs:
        alone = sorted(set(obs.loc[obs[PERTURBATION].notna(), BATCH]) - set(obs.loc[_is_control(obs), BATCH]))
        facts["batches_without_control"] = alone


def _look_at_guides(names: np.ndarray | None, source: ScreenSource, screen: Screen) -> None:
    """Say what guides target, as the run reads it."""
    targets = guide_targets([] if names is None else [str(name) for name in names], source)
    screen.facts["targets"] = _counted(pd.Series(list(targets.values())))
    screen.targets = sorted({gene for label in targets.values() for gene in genes_of(label)})


def _is_control(obs: pd.DataFrame) -> pd.Series:
    return obs[PERTURBATION] == CONTROL


def _mapping(raw: pd.Series, source: ScreenSource) -> tuple[dict[str, Any], set[str]]:
    """Say how each label of a file is understood, as the run does it; also what the labels become."""
    controls = control_names(source.control_label)
    counts = pd.Series(raw.tolist(), dtype=object).value_counts(dropna=False)
    rows, bad = [], []
    for label, cells in counts.items():
        try:
            mapped = normalize_label(label, source.separator, controls, source.label_pattern)
            rows.append((label, mapped, int(cells)))
        except InputError as error:
            bad.append({"raw": str(label), "cells": int(cells), "why": str(error)})
    facts = _listed_rows(rows)
    facts |= {"unparseable": bad, "other_controls": other_controls(raw.tolist(), controls)}
    return facts, {mapped for _, mapped, _ in rows if mapped is not None}


def _listing_of(raw: list[object], labels: list[object]) -> dict[str, Any]:
    """Say how each guide of a column is understood."""
    pairs = pd.DataFrame({"raw": raw, "label": labels}).value_counts(dropna=False)
    rows = [(*key, int(cells)) for key, cells in pairs.items()]  # type: ignore[misc]
    return _listed_rows(rows) | {"unparseable": [], "other_controls": {}}


def _listed_rows(rows: list[tuple[Any, Any, int]]) -> dict[str, Any]:
    """Lay out raw label, label and cells, most cells first."""
    known = [(raw, label, cells) for raw, label, cells in rows if isinstance(label, str)]
    missing = [(raw, cells) for raw, label, cells in rows if not isinstance(label, str)]

    def listed(chosen: list[tuple[Any, Any, int]]) -> list[dict[str, Any]]:
        return [{"raw": str(raw), "label": label, "cells": cells} for raw, label, cells in chosen[:LISTED]]

    return {
        "distinct": len(rows),
        "understood": len({label for _, label, _ in known}),
        "controls": listed([row for row in known if row[1] == CONTROL]),
        "top": listed([row for row in known if row[1] != CONTROL]),
        "changed": sum(str(raw) != label for raw, label, _ in known),
        "changed_top": listed([row for row in known if str(row[0]) != row[1] and row[1] != CONTROL]),
        "no_label": [{"raw": str(raw), "cells": cells} for raw, cells in missing],
    }


def _count_perturbations(
    obs: pd.DataFrame,
    settings: PreprocessSettings,
    source: ScreenSource,
    dataset: str,
    screen: Screen,
    problems: Problems,
) -> None:
    """Count perturbations, and drop those with too few cells as the filter of the run does."""
    facts, labels = screen.facts, obs[PERTURBATION]
    funnel = Funnel(len(obs))
    funnel.drop("unlabelled", "has a label", labels.isna().to_numpy())
    with problems.caught(dataset, "preprocess.min_cells_per_perturbation"):
        filter_small_perturbations(funnel, labels, settings.min_cells_per_perturbation, source.path)
    kept = obs.iloc[np.flatnonzero(funnel.keep)]
    counts = labels.dropna().value_counts()
    perturbed = counts.drop(CONTROL, errors="ignore")
    fewest = settings.min_cells_per_perturbation
    facts |= _numbers_of(kept)
    facts["labelled_cells"] = int(counts.sum())
    facts["perturbations_in_file"] = len(perturbed)
    facts["too_few_cells"] = {
        str(label): int(cells) for label, cells in perturbed[perturbed < fewest].items()
    }
    facts["min_cells_per_perturbation"] = fewest
    # Filters of cells, which need the counts, may take them below the limit.
    facts["near_the_limit"] = int(((perturbed >= fewest) & (perturbed < 1.5 * fewest)).sum())
    screen.obs = kept


def _numbers_of(obs: pd.DataFrame) -> dict[str, Any]:
    """Count controls, singles and combinations of cells that have labels."""
    names = sorted(set(obs[PERTURBATION]) - {CONTROL})
    return {
        "control_cells": int(_is_control(obs).sum()),
        "perturbations": len(names),
        "singles": sum(not is_combination(name) for name in names),
        "combinations": sum(is_combination(name) for name in names),
        "perturbed_genes": len({gene for name in names for gene in genes_of(name)}),
    }


def _from_earlier_run(dataset: str, screen: Screen, problems: Problems) -> None:
    """Take labels from the cells of an earlier run, where there are some and nothing else tells them."""
    path = Path(f"results/{dataset}/preprocess/cells.h5ad")
    if not path.is_file():
        screen.facts.setdefault("labels_from", UNKNOWN)
        return
    with problems.caught(dataset, str(path)), h5py.File(path, "r") as file:
        obs = read_elem(file["obs"])
        screen.obs = obs[[PERTURBATION, BATCH, CELL_TYPE]].astype(str)
        measured = read_elem(file["var"]).index
        screen.measured = screen.measured or [str(name) for name in measured]
        found: dict[str, Any] = _numbers_of(screen.obs) | {
            "labels_from": EARLIER,
            "earlier": str(path),
            "labelled_cells": len(obs),
        }
        if screen.facts["state"] != "read":
            # Of a screen that is there, cells, genes and batches are known, or a problem says why not.
            found |= {
                "cells": len(obs),
                "genes": len(measured),
                "batches": _counted(screen.obs[BATCH]),
                "cell_types": _counted(screen.obs[CELL_TYPE]),
            }
        screen.facts |= found | {"of_earlier_run": sorted(found)}


def _counted(values: pd.Series) -> dict[str, int]:
    """Count values, most frequent first."""
    return {str(value): int(n) for value, n in values.value_counts().items()}


def look_at_folds(
    config: Config, dataset: str, screen: Screen, problems: Problems
) -> Mapping[str, list[dict[str, int]]]:
    """Deal every fold to run of every scheme, by the function that freezes splits.

    Returns
    -------
    Scheme to folds: ``fold``, and perturbations in ``train``, ``val`` and ``test``; no scheme where labels
    are not known.
    """
    if screen.obs is None:
        return {}
    dealt: dict[str, list[dict[str, int]]] = {}
    settings = PairSettings(**config.settings(dataset, "pair"))
    for scheme in config.schemes:
        dealt[scheme] = []
        for fold in config.folds(dataset, scheme):
            with problems.caught(dataset, f"scheme {scheme}, fold {fold}"):
                table = hold_out(screen.obs, scheme, fold, settings, config.source(dataset).path)[0].table
                sizes = {name: int((table[SET] == name).sum()) for name in (TRAIN, VAL, TEST)}
                dealt[scheme].append({"fold": fold, **sizes})
    return dealt
