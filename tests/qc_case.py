"""Inputs of a page of quality control made by hand; names that look like markup among them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biojepa import contracts
from biojepa.qc_report import CellFacts, QcInputs
from report_case import NASTY

METRICS = ("library_size", "n_genes", "pct_mito")


def make_perturbations(n: int = 30, seed: int = 0) -> pd.DataFrame:
    """Return a table of perturbations, strongest first; the first ones have names that look like markup."""
    rng = np.random.default_rng(seed)
    names = [*NASTY, *(f"GENE{i}" for i in range(n - len(NASTY) - 1)), "GENE1+GENE2"][:n]
    effect = np.sort(rng.exponential(1.0, n))[::-1] - 0.3
    q = np.where(effect > 0.5, 0.003, 0.6)
    table = pd.DataFrame(
        {
            "perturbation": names,
            "n_perturbed_genes": [name.count("+") + 1 for name in names],
            "n_cells": rng.integers(26, 400, n),
            "n_guides": rng.integers(2, 5, n),
            "guides": "a;b",
            "target_measured": ["True;True" if "+" in name else "True" for name in names],
            "on_target_log2fc": [
                "-1.25;" if "+" in name else f"{-rng.uniform(0.3, 2):.6g}" for name in names
            ],
            "on_target_p": ["1e-09;" if "+" in name else "1e-05" for name in names],
            "effect_size": effect,
            "effect_p": q / 2,
            "effect_q": q,
            "n_deg": rng.integers(0, 60, n),
            "top_gene": "AVP",
            "top_gene_share": 0.91,
            "responding_share": np.nan,
            "flag": np.where(q < 0.05, "", "weak"),
        }
    )
    return table[list(contracts.PERTURBATION_TABLE_COLUMNS)]


def make_batches(names: list[str]) -> pd.DataFrame:
    """Return quantiles and limits of each batch, alike but for a small shift."""
    rows = []
    for metric, middle in zip(METRICS, (9_000.0, 2_500.0, 4.0), strict=True):
        for at, name in enumerate(names):
            shift = 1 + 0.1 * at / max(len(names) - 1, 1)
            ends = [middle * shift * part for part in (0.5, 0.8, 1, 1.2, 1.6)]
            low = np.nan if metric == "pct_mito" else middle * shift * 0.25
            rows.append((metric, name, 500, 450, *ends, low, middle * shift * 3))
    return pd.DataFrame(rows, columns=list(contracts.BATCHES_COLUMNS))


def make_distributions() -> pd.DataFrame:
    """Return histograms of three metrics."""
    tables = []
    for metric, high in zip(METRICS, (40_000.0, 6_000.0, 20.0), strict=True):
        edges = np.linspace(high / 100, high, 21)
        cells = (400 * np.exp(-(((np.arange(20) - 7) / 4) ** 2))).astype(int)
        tables.append(
            pd.DataFrame(
                {"metric": metric, "bin_low": edges[:-1], "bin_high": edges[1:], "cells": cells,
                 "cells_low_quality": cells // 10, "cells_kept": cells - cells // 10 - cells // 20}
            )
        )  # fmt: skip
    return pd.concat(tables, ignore_index=True)[list(contracts.DISTRIBUTIONS_COLUMNS)]


def make_guide_calls(names: list[str]) -> pd.DataFrame:
    """Return a row for each guide, fitted by the mixture; one borrows its threshold, one is never called."""
    n = len(names)
    called = np.arange(n, 0, -1) * 10
    called[-1] = 0
    table = pd.DataFrame(np.nan, index=range(n), columns=list(contracts.GUIDE_CALLS_COLUMNS)).astype(object)
    table["guide"], table["target"] = names, ["control", *(f"GENE{i}" for i in range(n - 1))]
    table["cells_counted"], table["umis"], table["threshold"] = called + 5, called * 30, 6
    table["cells_called"] = table["cells_assigned"] = table["cells_alone"] = called
    table["converged"], table["fallback"] = True, ""
    table.loc[2, "fallback"] = "few_positive_cells"
    return table


def make_qc() -> pd.DataFrame:
    """Return the rows of the filters: 3,000 cells are read, 2,260 kept."""
    rows = [
        ("no_guide", "mixture, posterior ≥ 0.5, ≥ 5 UMIs", 3000, 300, ""),
        ("too_many_guides", "≤ 1 guides", 2700, 200, ""),
        ("min_counts", "≥ 500 UMIs", 2500, 100, ""),
        ("max_pct_mito", "≤ 20 %", 2400, 140, ""),
        ("min_cells_per_perturbation", "≥ 25 cells", 2260, 0, "no perturbation lost"),
    ]
    table = pd.DataFrame(rows, columns=["filter", "threshold", "cells_before", "cells_removed", "note"])
    table["cells_after"] = table["cells_before"] - table["cells_removed"]
    return table[list(contracts.QC_COLUMNS)]


def make_qc_inputs(n: int = 30, batches: int = 3, cells: int = 300, n_guides: int = 40) -> QcInputs:
    """Return the inputs of a page of a screen without anything to complain about but one guide."""
    rng = np.random.default_rng(3)
    table, names = make_perturbations(n), [f"lane{i}" for i in range(batches)]
    rank = np.unique(np.geomspace(1, 3000, 50).round().astype(int))
    return QcInputs(
        dataset="screen <i>one</i>",
        qc=make_qc(),
        perturbations=table,
        guides=pd.DataFrame(columns=list(contracts.GUIDE_TABLE_COLUMNS)),
        guide_calls=make_guide_calls([NASTY[0], *(f"g{i}" for i in range(n_guides - 1))]),
        guides_per_cell=pd.DataFrame(
            {"status": ["no_guide", "assigned", "too_many_guides"], "n_guides": [0, 1, 2],
             "cells": [300, 2500, 200], "share": [0.1, 2500 / 3000, 200 / 3000]}
        ),
        guide_umis=pd.DataFrame({"rank": rank, "guide_umis": (3000 - rank) // 4}),
        batches=make_batches(names),
        distributions=make_distributions(),
        cells=CellFacts(
            n_cells=2260, n_controls=240, n_genes=8_000, types=("CRISPRi",),
            medians={"library_size": 9_123.0, "n_genes": 2_500.0, "pct_mito": 4.25},
            batches=pd.DataFrame(
                {"cells": 2260 // batches, "controls": 240 // min(batches, 12)}, index=names
            ),
            flags={"flag_weak_guide": 12},
        ),
        cell_map=pd.DataFrame(
            {"umap_1": rng.normal(size=cells), "umap_2": rng.normal(size=cells),
             "perturbation": rng.choice(["control", *table["perturbation"][:9]], cells),
             "batch": rng.choice(names, cells), "library_size": rng.integers(500, 20_000, cells)}
        ),
        settings={"min_cells_per_perturbation": 25, "doublets": "none"},
        reports={"index of all reports": "../../index.html"},
        files=("qc.tsv", "perturbations.tsv"),
    )  # fmt: skip
