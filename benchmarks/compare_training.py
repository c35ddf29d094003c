"""Compare choices of the model by how well it predicts perturbations that it did not see.

Question: what do the parts of BioJEPA and the settings of its training contribute? Method: train every
variant on the training perturbations of a fold exactly as the pipeline does, and predict others. Score:
Pearson correlation over genes of predicted and observed change, both against the training perturbed
mean, and squared error relative to that of the training perturbed mean. Units: none.

Which perturbations are scored depends on the screen. Of the simulated screens of ``development.yaml``,
which no report shows, those that the fold tests: nothing else is ever said about them. Of any other
screen the *validation* perturbations, with ``--labels val``; readout and gate have looked at these.

Usage::

    snakemake paired --cores 2 --configfile benchmarks/development.yaml
    python benchmarks/compare_training.py results/development_{1,2,3} --folds 0 1 --name training_choices

Writes ``benchmarks/results/<name>.json``. A variant that the collapse monitor stops says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from record import paired_difference, provenance, require_files, write_result  # noqa: E402

from biojepa.baselines import fit_baselines  # noqa: E402
from biojepa.collapse import CollapseError  # noqa: E402
from biojepa.contracts import PERTURBATION, TEST, VAL  # noqa: E402
from biojepa.evaluation.registry import pearson_rows  # noqa: E402
from biojepa.pairs import Pairs, read_pairs, trainable_labels  # noqa: E402
from biojepa.training import TrainedModel, TrainSettings, train_model  # noqa: E402

REFERENCE = "default"
BASELINES = ("multihot", "ridge", "kernel_ridge")
MEMBERS = 3
ZERO_NORM = 1e-6


@dataclass(frozen=True)
class Variant:
    """What a variant changes.

    Attributes
    ----------
    changes
        Keys of the section ``train`` that differ from the defaults.
    reuses
        Whether it takes the encoder of the default instead of training one.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    reuses: bool = False


def encoder(**changes: Any) -> Variant:
    """Vary the training of the encoder."""
    return Variant({"encoder": changes})


VARIANTS: dict[str, Variant] = {
    REFERENCE: Variant(),
    "latent view alone": Variant({"latent_share": 1.0}, reuses=True),
    "expression view alone": Variant({"latent_share": 0.0}, reuses=True),
    "latent predictor alone": Variant({"linear_branch": False}, reuses=True),
    "PCA instead of JEPA": Variant({"embedding": "pca"}),
    "untrained encoder": Variant({"embedding": "untrained"}),
    "no action term": encoder(action_weight=0.0),
    "action term of weight 3": encoder(action_weight=3.0),
    "mask 10-30 %": encoder(mask_low=0.1, mask_high=0.3),
    "mask 60-90 %": encoder(mask_low=0.6, mask_high=0.9),
    "mask modules": encoder(masking="modules"),
    "shared encoder, stop-gradient": encoder(target="shared_stop_gradient"),
    "shared encoder, with gradient": encoder(target="shared"),
    "SIGReg": encoder(regularizer="sigreg"),
    "flat VICReg": encoder(regularizer="flat"),
    "1000 steps": encoder(steps=1000),
    "joint training": Variant({"stages": "joint"}),
    "populations of 8": Variant({"linear_branch": False, "predictor": {"population": 8}}, reuses=True),
    "populations of 128": Variant({"linear_branch": False, "predictor": {"population": 128}}, reuses=True),
}
ENSEMBLE = f"ensemble of {MEMBERS} seeds"


@dataclass(frozen=True)
class Fold:
    """One fold and the observed changes of the labels to score."""

    name: str
    pairs: Pairs
    labels: np.ndarray
    observed: np.ndarray

    @classmethod
    def read(cls, folder: Path, fold: int, group: str) -> Fold:
        """Read ``pairs.h5``, and the mean expression of the scored labels from ``cells.h5ad``."""
        pairs = read_pairs(folder / "perturbation" / f"fold{fold}" / "pair" / "pairs.h5")
        cells = ad.read_h5ad(folder / "preprocess" / "cells.h5ad")[:, list(pairs.genes)]
        label = cells.obs[PERTURBATION].astype(str).to_numpy()
        labels = pairs.labels_of(group)
        means = [np.asarray(cells.X[label == pairs.labels[i]].mean(axis=0)).ravel() for i in labels]
        return cls(f"{folder.name}/fold{fold}", pairs, labels, np.stack(means) - pairs.pseudobulk()[1])

    def score(self, change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Correlation with, and squared error relative to, the training perturbed mean."""
        means, control = self.pairs.pseudobulk()
        mean = means[trainable_labels(self.pairs)].mean(axis=0) - control
        error, reference = ((x - self.observed) ** 2 for x in (change, mean))
        return pearson_rows(change - mean, self.observed - mean, ZERO_NORM), error.sum(
            axis=1
        ) / reference.sum(axis=1)


def predicted(model: TrainedModel, fold: Fold) -> np.ndarray:
    """Change of expression of the labels to score, before it is cut off at zero expression."""
    return model.change(*model.asked(fold.labels))


def measure(folder: Path, number: int, group: str, names: list[str], threads: int) -> list[dict[str, Any]]:
    """Score all variants on one fold, one row per variant and label."""
    fold = Fold.read(folder, number, group)
    rows: list[dict[str, Any]] = []

    def note(name: str, change: np.ndarray, weight: float | None = None) -> None:
        for label, r, error in zip(fold.labels, *fold.score(change), strict=True):
            where = f"{fold.name}/{fold.pairs.labels[label]}"
            rows.append({"variant": name, "label": where, "r": r, "error": error, "weight": weight})

    for name, prediction in fit_baselines(fold.pairs, BASELINES).items():
        note(f"baseline: {name}", prediction.delta[fold.labels])
    default: TrainedModel | None = None
    for name in names:
        variant = VARIANTS[name]
        settings = TrainSettings.from_config({"torch_threads": threads, "device": "cpu", **variant.changes})
        try:
            model, _, _ = train_model(fold.pairs, settings, 0, default if variant.reuses else None)
        except CollapseError as error:
            print(f"{fold.name}, {name}: {error}", file=sys.stderr)
            continue
        default = model if name == REFERENCE else default
        note(name, predicted(model, fold), model.weight)
    settings = TrainSettings.from_config({"torch_threads": threads, "device": "cpu"})
    members = [default, *(train_model(fold.pairs, settings, seed)[0] for seed in range(1, MEMBERS))]
    note(ENSEMBLE, np.mean([predicted(model, fold) for model in members if model is not None], axis=0))
    return rows


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Average over labels, with the paired difference to the default and its standard error."""
    reference = rows[rows["variant"] == REFERENCE].set_index("label")
    out = []
    for name, part in rows.groupby("variant", sort=False):
        values = part.set_index("label")
        difference, error = paired_difference(values["r"], reference.loc[values.index, "r"])
        out.append(
            {
                "variant": name,
                "n": len(values),
                "pearson": values["r"].mean(),
                "relative_error": values["error"].mean(),
                "minus_default": difference,
                "standard_error": error,
                "mean_gate": values["weight"].mean(),
            }
        )
    return pd.DataFrame(out)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("screens", nargs="+", help="results folders of screens, after `paired`")
    parser.add_argument("--folds", nargs="+", type=int, default=[0])
    parser.add_argument("--labels", choices=(TEST, VAL), default=TEST)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1, help="of a training; trainings run side by side")
    parser.add_argument("--workers", type=int, default=1, help="folds measured at a time")
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    if REFERENCE not in arguments.variants:
        parser.error(f"--variants must hold {REFERENCE}, which the others are compared with")
    if arguments.labels == TEST and any(
        "development" not in Path(screen).name for screen in arguments.screens
    ):
        parser.error("test perturbations are scored on development screens only; use --labels val")
    arguments.cells = [Path(screen) / "preprocess" / "cells.h5ad" for screen in arguments.screens]
    require_files(parser, arguments.cells)
    made_by = provenance(__file__, arguments)
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        jobs = [
            pool.submit(measure, Path(screen), fold, arguments.labels, arguments.variants, arguments.threads)
            for screen in arguments.screens
            for fold in arguments.folds
        ]
        rows = [row for job in tqdm(jobs, "folds") for row in job.result()]
    write_result(arguments.name, made_by, summarize(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
