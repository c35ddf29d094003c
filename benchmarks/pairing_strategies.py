"""Compare pairing strategies by balance and by how well validation perturbations are predicted.

Question: which controls should the predictor learn from? Method: build ``pairs.h5`` of each fold with every
strategy, train one encoder per fold, which no strategy changes, and on it one latent predictor alone for
each strategy. Score, of *validation* perturbations, against their mean expression: Pearson correlation over
genes of predicted and observed change, both against the training perturbed mean, and squared error relative
to that of the training perturbed mean. The predictor stops where it predicts the same perturbations best, of
every strategy alike; its squared error there, in the latent space, is given too. No cell of a perturbation
that the fold tests is read. Units: none, but for the processor seconds of the pair stage, a mean over folds.

What takes long is the training: folds × (1 encoder + 5 predictors) for each seed. ``--folds 0`` gives a first
answer. Plans of optimal transport have at most ``pair.transport_cells`` cells on a side.

Usage::

    snakemake --cores 2 results/demo/preprocess/cells.h5ad
    python benchmarks/pairing_strategies.py results/demo --networks resources/datasets/demo/network.tsv.gz \
        --gene-sets resources/datasets/demo/gene_sets.gmt

Prints one row for each strategy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from compare_training import Fold, predicted  # noqa: E402
from record import paired_difference, require_files  # noqa: E402

from biojepa.balance import pairing_balance  # noqa: E402
from biojepa.contracts import POPULATION, STRATEGIES, STRATEGY  # noqa: E402
from biojepa.files import sha256_of  # noqa: E402
from biojepa.pairing import PairSettings, build_pairs, freeze_split  # noqa: E402
from biojepa.pairs import read_pairs, validation_labels  # noqa: E402
from biojepa.training import TrainSettings, train_model  # noqa: E402


def measure(
    cells: Path, folder: Path, fold: int, asked: argparse.Namespace
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Score all strategies on one fold: a row for each strategy, seed and label, and the balance."""
    split = folder / f"fold{fold}.tsv"
    freeze_split(cells, split, "screen", "perturbation", fold, PairSettings())
    facts = {"scheme": "perturbation", "fold": fold, "split_sha256": sha256_of(split)}
    settings = TrainSettings.from_config({"device": "cpu", "torch_threads": 1, "linear_branch": False})
    rows, balance, encoder = [], [], {}
    for strategy in STRATEGIES:
        path = folder / f"{strategy}{fold}.h5"
        chosen = PairSettings(strategy=strategy)
        began = time.process_time()
        build_pairs(cells, split, path, asked.networks, asked.gene_sets, chosen, facts)
        seconds = time.process_time() - began
        balance.append(pairing_balance(cells, path))
        pairs = read_pairs(path)
        labels = validation_labels(pairs)
        means, control = pairs.pseudobulk()
        scored = Fold(f"fold{fold}", pairs, labels, means[labels] - control)
        for seed in range(asked.seeds):
            model, history, _ = train_model(pairs, settings, seed, encoder.get(seed))
            latent = history.loc[history["stage"] == "predictor", "val_loss"].min()
            # The first is of populations; its encoder is that of all strategies.
            encoder.setdefault(seed, model)
            for label, r, error in zip(labels, *scored.score(predicted(model, scored)), strict=True):
                where = f"{fold}/{pairs.labels[label]}"
                row = {STRATEGY: strategy, "label": where, "r": r, "error": error}
                rows.append({**row, "latent": latent, "seconds": seconds})
        print(f"fold {fold}, {strategy}: done, paired in {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows, pd.concat(balance)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="folder of a dataset's results")
    parser.add_argument("--networks", nargs="*", default=[])
    parser.add_argument("--gene-sets", nargs="*", default=[])
    parser.add_argument("--folds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    cells = asked.results / "preprocess" / "cells.h5ad"
    require_files(parser, [cells])
    with tempfile.TemporaryDirectory() as name:
        done = [measure(cells, Path(name), fold, asked) for fold in asked.folds]
    rows = pd.DataFrame([row for part, _ in done for row in part])
    scores = rows.groupby([STRATEGY, "label"])[["r", "error", "latent", "seconds"]].mean()
    balance = pd.concat([part for _, part in done])
    depth = balance[balance["covariate"] == "log_library_size"].groupby(STRATEGY).mean(numeric_only=True)
    batch = balance[balance["covariate"] == "batch"].groupby(STRATEGY)["abs_smd_after"].mean()
    n = scores.loc[POPULATION].shape[0]
    head = [
        f"{asked.results.name}, {n} validation perturbations",
        "r",
        "minus population",
        "relative error",
        "latent",
    ]
    print(f"| {' | '.join([*head, 'SMD of depth', 'its magnitude', 'that of batch', 'seconds of pair'])} |")
    print("| --- |" + " ---: |" * 8)
    for strategy in STRATEGIES:
        own = scores.loc[strategy]
        difference, error = paired_difference(own["r"], scores.loc[POPULATION].loc[own.index, "r"])
        cells_of_row = [f"{own['r'].mean():.3f}", f"{difference:+.3f} ± {error:.3f}"]
        cells_of_row += [
            f"{own['error'].mean():.3f}",
            f"{own['latent'].mean():.3f}",
            f"{depth.loc[strategy, 'smd_after']:+.2f}",
        ]
        cells_of_row += [f"{depth.loc[strategy, 'abs_smd_after']:.2f}", f"{batch[strategy]:.2f}"]
        cells_of_row += [f"{own['seconds'].mean():.1f}"]
        print(f"| {strategy} | {' | '.join(cells_of_row)} |")


if __name__ == "__main__":
    main()
