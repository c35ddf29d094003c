"""Compare settings of the encoder by what its embedding of a perturbation still holds.

Question: how well can the expression change of a perturbation be read out of its *observed* embedding?
A latent predictor learns to hit that embedding, so it can hardly do better. Method: train the embedding
and its linear readout on training cells exactly as the pipeline does, embed the cells of the
*validation* perturbations, and read the change out of their mean tokens. Test perturbations have no
cell in ``pairs.h5``. The penalty of the readout, one of five, is chosen on the same validation
perturbations, alike for all variants. Score: Pearson correlation over genes of the change read out and
observed, both against the training perturbed mean, and squared error summed over genes. Units: natural
log of counts per target sum; seconds of the embedding and its readout, which depend on the machine and
its load.

Usage::

    python benchmarks/compare_encoders.py PAIRS.h5 ... [--variants default pca ...] [--seeds 1]
        --name encoders_demo

Writes ``benchmarks/results/<name>.json``. Scores of several files are averaged over all their
validation perturbations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from record import (  # noqa: E402
    paired_difference,
    provenance,
    require_files,
    squared_error,
    write_result,
)

from biojepa.collapse import CollapseError  # noqa: E402
from biojepa.evaluation.registry import pearson_rows  # noqa: E402
from biojepa.pairs import Pairs, read_pairs, trainable_labels, validation_labels  # noqa: E402
from biojepa.training.cells import CellStore  # noqa: E402
from biojepa.training.encoder_stage import EncoderSettings  # noqa: E402
from biojepa.training.predictor_stage import PredictorSettings  # noqa: E402
from biojepa.training.run import embed, train_model  # noqa: E402
from biojepa.training.settings import TrainSettings  # noqa: E402

ZERO_NORM = 1e-6
REFERENCE = "default"
# Kind of embedding, and what differs from the default encoder.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("jepa", {}),
    "pca": ("pca", {}),
    "untrained": ("untrained", {}),
    "action_weight_0": ("jepa", {"action_weight": 0.0}),
    "action_weight_0.1": ("jepa", {"action_weight": 0.1}),
    "action_weight_1": ("jepa", {"action_weight": 1.0}),
    "action_weight_10": ("jepa", {"action_weight": 10.0}),
    "larger": ("jepa", {"hidden": (512, 256), "depth": 2}),
    "flat": ("jepa", {"regularizer": "flat"}),
    "flat_action_weight_0": ("jepa", {"regularizer": "flat", "action_weight": 0.0}),
    "mask_low": ("jepa", {"mask_low": 0.1, "mask_high": 0.4}),
    "mask_high": ("jepa", {"mask_low": 0.5, "mask_high": 0.8}),
}


def settings_of(variant: str, steps: int | None = None) -> TrainSettings:
    """Set a variant up without linear branch and without training the predictor: nobody looks at them."""
    embedding, changes = VARIANTS[variant]
    if steps is not None:
        changes = {**changes, "steps": steps}
    return TrainSettings(
        embedding=embedding,
        linear_branch=False,
        encoder=replace(EncoderSettings(), **changes),
        predictor=PredictorSettings(steps=0),
        device="cpu",
        torch_threads=1,
    )


def measure(pairs: Pairs, settings: TrainSettings, seed: int) -> pd.DataFrame:
    """Train an embedding and read validation perturbations out of it.

    Returns
    -------
    One row per validation perturbation: ``perturbation``, ``r``, ``squared_error``, and, alike in all
    rows, ``seconds``, ``rankme`` and ``std_cells``. A collapsed run scores NaN.
    """
    train, validation = trainable_labels(pairs), validation_labels(pairs)
    names = [pairs.labels[label] for label in validation]
    try:
        model, _, metrics = train_model(pairs, settings, seed)
    except CollapseError:
        return pd.DataFrame({"perturbation": names, "r": np.nan, "squared_error": np.nan, "collapsed": True})
    store = CellStore(pairs, torch.device("cpu"))
    tokens = embed(model.embedding, store, torch.arange(len(store)))
    means = [tokens[torch.from_numpy(pairs.perturbation == label)].mean(dim=0) for label in validation]
    read_out = model.readout.change(torch.stack(means) - model.control_tokens).numpy()
    expression, control = pairs.pseudobulk()
    delta = expression - control
    mean = delta[train].mean(axis=0)
    return pd.DataFrame(
        {
            "perturbation": names,
            "r": pearson_rows(read_out - mean, delta[validation] - mean, ZERO_NORM),
            "squared_error": squared_error(read_out, delta[validation]),
            "collapsed": False,
            "seconds": metrics["seconds"],
            "rankme": metrics["embedding"]["rankme"],
            "std_cells": metrics["embedding"]["std_cells"],
        }
    )


def no_change(pairs: Pairs) -> float:
    """Mean squared error of predicting no change, the scale of the others."""
    expression, control = pairs.pseudobulk()
    delta = (expression - control)[validation_labels(pairs)]
    return float(squared_error(np.zeros_like(delta), delta).mean())


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Average over files, seeds and validation perturbations, and compare with the default in pairs."""
    keys = ["perturbation", "file", "seed"]
    reference = scores[scores.variant == REFERENCE].set_index(keys).r
    rows = []
    for name, own in scores.groupby("variant", sort=False):
        gain, error = paired_difference(own.set_index(keys).r, reference)
        rows.append(
            {
                "variant": name,
                "r": own.r.mean(),
                "squared_error": own.squared_error.mean(),
                "r_minus_default": gain,
                "standard_error": error,
                "rankme": own.rankme.mean(),
                "std_cells": own.std_cells.mean(),
                "seconds": own.seconds.mean(),
                "collapsed": bool(own.collapsed.any()),
            }
        )
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pairs", type=Path, nargs="+", metavar="PAIRS.h5", help="pairs.h5 of folds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="to compare")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each variant")
    parser.add_argument("--steps", type=int, default=None, help="of the encoder; default: as shipped")
    parser.add_argument("--name", required=True, help="of the result in benchmarks/results")
    options = parser.parse_args(arguments)
    require_files(parser, options.pairs)
    if REFERENCE not in options.variants:
        parser.error(f"the others are compared with {REFERENCE!r}, which must be among the variants")
    made_by = provenance(__file__, options)
    folds = [read_pairs(path) for path in options.pairs]
    scores = []
    for variant in options.variants:
        settings = settings_of(variant, options.steps)
        for file, pairs in enumerate(folds):
            for seed in range(options.seeds):
                scores.append(measure(pairs, settings, seed).assign(variant=variant, file=file, seed=seed))
                print(variant, file, seed, f"r {scores[-1].r.mean():.3f}", file=sys.stderr, flush=True)
    write_result(
        options.name,
        made_by,
        summarize(pd.concat(scores, ignore_index=True)),
        folds=[{key: pairs.facts[key] for key in ("dataset", "fold", "split_sha256")} for pairs in folds],
        validation_perturbations=[len(validation_labels(pairs)) for pairs in folds],
        no_change_squared_error=[float(f"{no_change(pairs):.6g}") for pairs in folds],
    )


if __name__ == "__main__":
    main()
