"""Compare the mixture with dominance on a real screen, and with the truth on simulated ones; time it.

On Papalexi et al. (one guide per cell): the share of cells with the same guide among those that both
rules assign, and how far each measured target falls under each rule, as log2 of the ratio of mean
expression in its cells to that in control cells. Where both rules ask for one guide with 60 % of the UMIs,
they can hardly name two, so the top called guide of the mixture without ``min_share`` is compared too, with
the cells that one rule alone calls. On simulated counts, whose background is a
gamma-Poisson and whose carried guides are log-normal: precision and recall of the calls, seconds and
memory, for one guide per cell and for many.

Also on Papalexi et al.: how much of the fall of a target is seen in cells where most guide UMIs are on no
called guide, and in cells where the target's guide is the weaker one of two.

    python benchmarks/guide_assignment.py DATA

DATA holds ``papalexi2021_10x/``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "lib"))

from record import provenance, require_files, write_result

from biojepa.contracts import CONTROL
from biojepa.guides import ASSIGNED, GuideAssignment, GuideCalls, call_guides
from biojepa.preprocess.annotate import guide_targets
from biojepa.raw import GUIDE_COUNTS, GUIDE_NAMES, ScreenSource, read_screen

SCREEN = "papalexi2021_10x"
FILES = ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz", "cells.csv", "guides.csv")
LIBRARY = "n_umis_all_genes"
RULES = {
    "dominance": GuideAssignment(),
    "mixture": GuideAssignment(method="mixture", max_guides=1),
    "mixture_two_guides": GuideAssignment(method="mixture", max_guides=2),
}
# Resamplings of cells behind the standard error of the difference of two falls.
DRAWS = 200


def real_screen(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[dict[str, object]]]:
    """Compare the rules on Papalexi et al.; return rows of targets, of rules and of kinds of cells."""
    source = ScreenSource(
        "papalexi",
        str(folder),
        control_label="non-targeting",
        library_size_column=LIBRARY,
        cell_metadata=str(folder / "cells.csv"),
        guide_table=str(folder / "guides.csv"),
    )
    screen = read_screen(source)
    names = [str(name) for name in screen.uns[GUIDE_NAMES]]
    targets = guide_targets(names, source)
    calls = {
        rule: call_guides(screen.obsm[GUIDE_COUNTS], names, targets, settings)
        for rule, settings in RULES.items()
    }
    library = screen.obs[LIBRARY].to_numpy()
    measured = sorted(set(targets.values()) & set(screen.var_names))
    rows = [
        {"target": gene, **falls(screen[:, gene].X.toarray().ravel() / library, gene, calls)}
        for gene in measured
    ]
    expression = {gene: screen[:, gene].X.toarray().ravel() / library for gene in measured}
    kinds = parts_of_the_fall(screen.obsm[GUIDE_COUNTS].toarray(), names, targets, expression)
    free = top_of_fitted(screen.obsm[GUIDE_COUNTS], names, targets, calls["dominance"])
    rules = [*(agreement(rule, calls) for rule in RULES), free]
    return pd.DataFrame(rows), pd.DataFrame(rules), kinds


def top_of_fitted(
    counts: sparse.csr_matrix, names: list[str], targets: dict[str, str], dominance: GuideCalls
) -> dict[str, object]:
    """Compare the top guide that reaches its fitted threshold, of whatever share, with that of dominance."""
    every_guide = GuideAssignment(method="mixture", min_share=0, max_guides=len(names))
    threshold = call_guides(counts, names, targets, every_guide).guides["threshold"]
    dense = counts.toarray()
    called = np.where(dense >= threshold.to_numpy(), dense, 0)
    by_mixture = called.any(axis=1)
    by_dominance = (dominance.cells["status"] == ASSIGNED).to_numpy()
    both = by_mixture & by_dominance
    same = np.array(names)[called.argmax(axis=1)] == dominance.cells["guide_id"].to_numpy()
    return {
        "rule": "mixture_top_guide_of_any_share",
        "assigned": int(by_mixture.sum()),
        "assigned_by_both": int(both.sum()),
        "same_guides": float(same[both].mean()),
        "by_dominance_alone": int((by_dominance & ~by_mixture).sum()),
        "by_mixture_alone": int((by_mixture & ~by_dominance).sum()),
    }


def parts_of_the_fall(
    counts: np.ndarray, names: list[str], targets: dict[str, str], expression: dict[str, np.ndarray]
) -> list[dict[str, object]]:
    """Return how much of the fall of their target some kinds of cells show, over all measured targets.

    The whole fall, 1, is that of cells with one called guide that holds 60 % or more of the guide UMIs.
    """
    every_guide = GuideAssignment(method="mixture", min_share=0, max_guides=len(names))
    threshold = call_guides(sparse.csr_matrix(counts), names, targets, every_guide).guides["threshold"]
    called = np.where(counts >= threshold.to_numpy(), counts, 0)
    number, order = (called > 0).sum(axis=1), np.argsort(called, axis=1)
    label = np.array([targets[name] for name in names])
    top, second = (np.take_along_axis(called, order[:, [-rank]], axis=1).ravel() for rank in (1, 2))
    first_label, second_label = label[order[:, -1]], label[order[:, -2]]
    clear = (number == 1) & (top >= 0.6 * counts.sum(axis=1))
    two = (number == 2) & (first_label != second_label)
    kinds = {
        "one guide, 60 % of the UMIs or more": (clear, first_label),
        "one guide, less than 60 %": ((number == 1) & ~clear, first_label),
        "weaker of two, 5 to 20 % of the other": (
            two & (second >= 0.05 * top) & (second < 0.2 * top),
            second_label,
        ),
        "weaker of two, less than 5 %": (two & (second < 0.05 * top), second_label),
    }
    rows: list[dict[str, object]] = []
    for kind, (cells, target) in kinds.items():
        fall, whole, variance, n_targeted = 0.0, 0.0, 0.0, 0
        for gene, values in expression.items():
            control = values[clear & (first_label == CONTROL)].mean()
            found = values[cells & (target == gene)] / control
            if len(found) < 2:
                continue
            fall += (1 - found).sum()
            whole += len(found) * (1 - values[clear & (first_label == gene)].mean() / control)
            variance += len(found) * found.var(ddof=1)
            n_targeted += len(found)
        rows.append(
            {
                "kind": kind,
                "cells": int(cells.sum()),
                "cells_of_measured_targets": n_targeted,
                "part_of_the_fall": fall / whole,
                "standard_error": float(np.sqrt(variance) / whole),
            }
        )
    return rows


def agreement(rule: str, calls: dict[str, GuideCalls]) -> dict[str, object]:
    """Count the cells of a rule, and those for which dominance says the same."""
    made, reference = calls[rule].cells, calls["dominance"].cells
    both = ((made["status"] == ASSIGNED) & (reference["status"] == ASSIGNED)).to_numpy()
    fallback = calls[rule].guides["fallback"]
    return {
        "rule": rule,
        **made["status"].value_counts().to_dict(),
        "assigned_by_both": int(both.sum()),
        "same_label": float((made["label"] == reference["label"])[both].mean()),
        "same_guides": float((made["guide_id"] == reference["guide_id"])[both].mean()),
        "guides_with_a_fallback": int((fallback != "").sum()),
    }


def falls(expression: np.ndarray, gene: str, calls: dict[str, GuideCalls]) -> dict[str, float]:
    """Return the fall of a target under each rule, and the difference of two with its standard error."""
    rng = np.random.default_rng(0)
    labels = {rule: made.cells["label"].to_numpy() for rule, made in calls.items()}

    def of(rule: str, weight: np.ndarray) -> float:
        means = [
            np.average(expression[labels[rule] == label], weights=weight[labels[rule] == label])
            for label in (gene, CONTROL)
        ]
        return float(-np.log2(means[0] / means[1]))

    # The rules share most of their cells, so that their difference is resampled and not each alone.
    draws = [rng.poisson(1.0, len(expression)) for _ in range(DRAWS)]
    difference = [of("mixture", weight) - of("dominance", weight) for weight in draws]
    row = {rule: of(rule, np.ones(len(expression))) for rule in RULES}
    return {
        **row,
        "difference": row["mixture"] - row["dominance"],
        "standard_error": float(np.std(difference, ddof=1)),
        "cells_dominance": int((labels["dominance"] == gene).sum()),
        "cells_mixture": int((labels["mixture"] == gene).sum()),
    }


def simulate(
    n_cells: int, n_guides: int, moi: float, seed: int
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Draw guide counts and who carries what, both ``(cells, guides)``; ``moi`` is guides per cell."""
    rng = np.random.default_rng(seed)
    background = np.exp(rng.uniform(np.log(0.005), np.log(0.3), n_guides))
    middle, spread = rng.uniform(5, 7, n_guides), rng.uniform(1.2, 2.0, n_guides)
    counts, carried = [], []
    for first in range(0, n_cells, 5_000):
        size = min(5_000, n_cells - first)
        block = rng.poisson(rng.gamma(1.0, 1.0, size)[:, None] * background)
        has = rng.random((size, n_guides)) < moi / n_guides
        cell, guide = np.nonzero(has)
        block[cell, guide] += np.rint(np.exp2(rng.normal(middle[guide], spread[guide]))).astype(np.int64)
        counts.append(sparse.csr_matrix(block, dtype=np.int32))
        carried.append(sparse.csr_matrix(has))
    return sparse.vstack(counts, format="csr"), sparse.vstack(carried, format="csr")


def simulated_screen(n_cells: int, n_guides: int, moi: float) -> dict[str, float]:
    """Time the mixture on simulated counts and compare its calls with the truth."""
    counts, carried = simulate(n_cells, n_guides, moi, seed=0)
    names = [f"g{guide}" for guide in range(n_guides)]
    settings = GuideAssignment(method="mixture", min_umis=1, min_share=0, max_guides=n_guides)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    calls = call_guides(counts, names, dict.fromkeys(names, CONTROL), settings)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    threshold = calls.guides["threshold"].to_numpy()
    called = counts.copy()
    called.data = (counts.data >= threshold[counts.indices]).astype(np.int32)
    right = int(called.multiply(carried).sum())
    return {
        "cells": n_cells,
        "guides": n_guides,
        "guides_per_cell": moi,
        "entries": int(counts.nnz),
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "added_peak_gib": (after.ru_maxrss - before.ru_maxrss) / 2**20,
        "precision": right / int(called.sum()),
        "recall": right / int(carried.sum()),
        "expected_false": float(
            np.average(calls.guides["expected_false"], weights=calls.guides["cells_called"])
        ),
        "guides_with_a_fallback": int((calls.guides["fallback"] != "").sum()),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that holds papalexi2021_10x/")
    parser.add_argument("--cells", type=int, default=100_000, help="of the simulated screens")
    parser.add_argument("--guides", type=int, default=1_000, help="of the simulated screens")
    parser.add_argument("--name", default="guide_assignment")
    arguments = parser.parse_args()
    folder = arguments.data / SCREEN
    # The files stand for the folder in what is recorded.
    arguments.data = [folder / name for name in FILES]
    require_files(parser, arguments.data)
    made_by = provenance(__file__, arguments)
    simulated = [simulated_screen(arguments.cells, arguments.guides, moi) for moi in (1.0, 10.0)]
    targets, rules, kinds = real_screen(folder)
    for table in (pd.DataFrame(simulated).T, rules.T, pd.DataFrame(kinds)):
        print(table.to_string(), end="\n\n")
    mean = targets.mean(numeric_only=True).to_dict()
    write_result(
        arguments.name,
        made_by,
        targets,
        mean_fall={rule: round(mean[rule], 4) for rule in RULES},
        rules=rules.astype(object).where(rules.notna(), None).to_dict("records"),
        parts_of_the_fall=kinds,
        simulated=simulated,
    )


if __name__ == "__main__":
    main()
