"""Measure how seconds and memory of the stages that read all cells grow with cells and perturbations.

Question: is the time of preprocess, pair, train and embed linear in the cells, and the memory flat, so that
a million cells need no large machine? Method: simulate screens of 5,000 genes, 8 % of the matrix filled
(``sparse_screen.py``): 10,000 to 1,000,000 cells with 1,000 perturbations, and 100 to 10,000 perturbations
with 100,000 cells. Each stage runs in a process of its own, one thread, with the settings of the pipeline
but for the smallest number of cells of a perturbation, which is 2, so that none is lost where cells are few.
Training takes 50 steps of each stage, so that what it spends on cells besides steps is seen. Embedding uses
an untrained encoder of the default size, made once from the smallest screen. Seconds and processor seconds
exclude imports; peak memory is the resident set of the process, imports included. Exponents are slopes of
least squares of the logarithms; *last* is that of the two largest sizes, where constant costs weigh least.

Usage::

    python benchmarks/scaling.py [--largest 1000000] [--stages preprocess pair train embed] [--name scaling]

``--largest`` leaves out screens with more cells. Writes ``benchmarks/results/<name>.json``. Linux only, for
it reads ``/proc``. The largest screen takes 3.2 GB of disk, and its results 2 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from sparse_screen import SparseScreen, measured, run_and_print, screen_source

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from record import provenance, write_result  # noqa: E402

CELLS = (10_000, 100_000, 1_000_000)
PERTURBATIONS = (100, 1_000, 10_000)
CENTRE = (100_000, 1_000)
STAGES = ("preprocess", "pair", "train", "embed")


def sizes(largest: int) -> list[tuple[int, int]]:
    """Return cells and perturbations of every screen, smallest first."""
    both = {(cells, CENTRE[1]) for cells in CELLS} | {(CENTRE[0], n) for n in PERTURBATIONS}
    return sorted(size for size in both if size[0] <= largest)


# --- the stages, each in a process of its own -------------------------------------------------------


def preprocess(folder: Path) -> Callable[[], None]:
    """Prepare to preprocess the screen in ``folder``."""
    from biojepa.preprocess import PreprocessSettings, preprocess_file

    settings = PreprocessSettings(min_cells_per_perturbation=2)
    files = [folder / name for name in ("cells.h5ad", "qc.tsv", "perturbations.tsv")]
    return lambda: preprocess_file(screen_source(folder), settings, *files, guides=folder / "guides.tsv")


def pair(folder: Path) -> Callable[[], None]:
    """Prepare to freeze a split and to pair the cells in ``folder``."""
    from biojepa.files import sha256_of
    from biojepa.pairing import PairSettings, build_pairs, freeze_split

    settings, split = PairSettings(), folder / "split.tsv"

    def run() -> None:
        freeze_split(folder / "cells.h5ad", split, "simulated", "perturbation", 0, settings)
        facts = {"dataset": "simulated", "scheme": "perturbation", "fold": 0, "seed": 0}
        facts["split_sha256"] = sha256_of(split)
        networks = [folder / "network.tsv"]
        build_pairs(folder / "cells.h5ad", split, folder / "pairs.h5", networks, [], settings, facts)

    return run


def embed(folder: Path) -> Callable[[], None]:
    """Prepare to embed all cells in ``folder`` with the model beside it."""
    import torch

    from biojepa.embedding import Screen, embed_screen
    from biojepa.training import load_model

    torch.set_num_threads(1)
    model = load_model(folder.parent / "model.pt", "cpu")

    def run() -> None:
        screen = Screen.read(folder / "cells.h5ad")
        groups = pd.factorize(screen.labels)[0]
        path = folder / "cells.h5ad"
        pooled, _ = embed_screen(model, path, screen.genes, screen.log_library, groups, groups.max() + 1)
        np.save(folder / "embedding.npy", pooled)

    return run


def make_model(folder: Path) -> Callable[[], None]:
    """Prepare to make an untrained encoder, with a predictor of a few steps, from ``folder``."""
    from biojepa.pairs import read_pairs
    from biojepa.training import TrainSettings, train_model

    settings = TrainSettings.from_config(
        {"embedding": "untrained", "device": "cpu", "torch_threads": 1, "predictor": {"steps": 10}}
    )

    def run() -> None:
        model, _, _ = train_model(read_pairs(folder / "pairs.h5"), settings, seed=0)
        model.save(folder.parent / "model.pt")

    return run


def train(folder: Path) -> Callable[[], None]:
    """Prepare to train 50 steps of each stage: what it takes besides steps is what cells can add to it."""
    from biojepa.pairs import read_pairs
    from biojepa.training import TrainSettings, train_model

    settings = TrainSettings.from_config(
        {
            "device": "cpu",
            "torch_threads": 1,
            "encoder": {"steps": 50, "monitor_every": 50},
            "predictor": {"steps": 50, "evaluate_every": 50},
        }
    )

    def run() -> None:
        model, _, _ = train_model(read_pairs(folder / "pairs.h5"), settings, seed=0)
        model.save(folder / "trained.pt")

    return run


def simulate(folder: Path) -> Callable[[], None]:
    """Prepare to write the screen that the name of ``folder`` says."""
    n_cells, n_perturbations = (int(part) for part in folder.name.split("_"))
    return lambda: SparseScreen(n_cells=n_cells, n_perturbations=n_perturbations).write(folder)


COMMANDS = {
    "preprocess": preprocess,
    "pair": pair,
    "train": train,
    "embed": embed,
    "model": make_model,
    "simulate": simulate,
}


# --- the measurement ----------------------------------------------------------------------------


def measure(folder: Path, largest: int, stages: list[str]) -> pd.DataFrame:
    """Simulate each screen, run the stages on it, remove it; one row for each screen and stage."""
    rows = []
    for n_cells, n_perturbations in sizes(largest):
        screen = folder / f"{n_cells}_{n_perturbations}"
        measured(__file__, "simulate", screen)
        for stage in STAGES:
            if stage == "embed" and "embed" in stages and not (folder / "model.pt").exists():
                measured(__file__, "model", screen)
            if stage in stages:
                row = {"stage": stage, "cells": n_cells, "perturbations": n_perturbations}
                rows.append({**row, **measured(__file__, stage, screen)})
                print(rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(screen)
    return pd.DataFrame(rows)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Fit how seconds and memory grow with cells and with perturbations, for each stage."""
    rows = []
    for stage, of_stage in table.groupby("stage", sort=False):
        for axis, fixed, value in (
            ("cells", "perturbations", CENTRE[1]),
            ("perturbations", "cells", CENTRE[0]),
        ):
            series = of_stage[of_stage[fixed] == value].sort_values(axis)
            if len(series) < 2:
                continue
            size = np.log(series[axis].to_numpy(float))
            row = {"stage": stage, "over": axis, "from": series[axis].iloc[0], "to": series[axis].iloc[-1]}
            for name in ("seconds", "processor_seconds", "peak_gib"):
                values = np.log(series[name].to_numpy(float))
                row[name] = np.polyfit(size, values, 1)[0]
                row[f"{name}_last"] = np.diff(values)[-1] / np.diff(size)[-1]
            rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Measure every screen and write the result; with ``--stage`` run one stage and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--largest", type=int, default=max(CELLS), help="cells of the largest screen")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--name", default="scaling")
    parser.add_argument("--stage", choices=list(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help="folder for the screens; default: that of the system")
    arguments = parser.parse_args()
    if arguments.stage:
        run_and_print(COMMANDS[arguments.stage](Path(arguments.folder)))
        return
    made_by = provenance(__file__, arguments)
    # Where the screens lie says nothing about the result.
    made_by["arguments"] = {key: made_by["arguments"][key] for key in ("largest", "stages", "name")}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        table = measure(Path(folder), arguments.largest, arguments.stages)
    fitted = exponents(table)
    if len(fitted):
        print(fitted.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    write_result(
        arguments.name, made_by, table, exponents=json.loads(fitted.round(3).to_json(orient="records"))
    )


if __name__ == "__main__":
    main()
