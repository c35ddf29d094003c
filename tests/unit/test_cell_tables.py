"""Tables of guides, batches and distributions, against what they are thinned or summed from."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from biojepa import contracts
from biojepa.files import read_tsv
from biojepa.guides import GuideAssignment
from biojepa.preprocess import PreprocessSettings, preprocess_file, preprocess_screen
from biojepa.preprocess.cell_tables import BINS, KNEE_POINTS, ranked_umis
from biojepa.raw import GUIDE_COUNTS, GUIDE_NAMES, ScreenSource

GUIDES = ["NT_g1", "A_g1", "B_g1"]
SOURCE = ScreenSource("toy", "toy.h5ad", label_pattern="_g1$", control_label="NT", batch_column="lane")
SETTINGS = PreprocessSettings(
    min_cells_per_perturbation=10,
    permutations=9,
    effect_components=3,
    guide_assignment=GuideAssignment(method="threshold"),
)


def guide_screen():
    """Return 400 cells of two lanes: 390 with one guide, 4 with none, 6 with three; one is very large."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(4.0, (400, 30)).astype(np.float32)
    counts[:, 25:] = rng.poisson(0.8, (400, 5))  # mitochondrial, 4 % of the UMIs together
    counts[7] = 400
    guides = np.zeros((400, 3), dtype=np.float32)
    guides[np.arange(400), np.arange(400) % 3] = rng.integers(10, 60, 400)
    guides[:4], guides[10:16] = 0, 20
    obs = pd.DataFrame(
        {"lane": np.where(np.arange(400) < 250, "x", "y")}, index=[f"c{i}" for i in range(400)]
    )
    genes = [f"G{i}" for i in range(24)] + ["A", *(f"MT-{i}" for i in range(5))]
    screen = ad.AnnData(X=sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    screen.obsm[GUIDE_COUNTS] = sparse.csr_matrix(guides)
    screen.uns[GUIDE_NAMES] = np.array(GUIDES, dtype=object)
    return screen, counts, guides


@pytest.fixture(scope="module")
def made():
    screen, counts, guides = guide_screen()
    return preprocess_screen(screen, SOURCE, SETTINGS), counts, guides


def test_guides_and_classes_of_cells_are_those_of_the_counts(made):
    result, _, guides = made
    table = result.tables.guide_calls
    assert tuple(table.columns) == contracts.GUIDE_CALLS_COLUMNS
    assert table["guide"].tolist() == GUIDES
    assert table["target"].tolist() == ["control", "A", "B"]
    assert table["cells_called"].tolist() == (guides >= 5).sum(axis=0).tolist()
    assert table["umis"].tolist() == guides.sum(axis=0).tolist()
    classes = result.tables.guides_per_cell
    assert tuple(classes.columns) == contracts.GUIDES_PER_CELL_COLUMNS
    found = dict(zip(zip(classes["status"], classes["n_guides"], strict=True), classes["cells"], strict=True))
    assert found == {("no_guide", 0): 4, ("assigned", 1): 390, ("too_many_guides", 3): 6}
    assert classes["share"].sum() == pytest.approx(1)


def test_the_knee_is_the_ranked_umis_thinned(made):
    result, _, guides = made
    ranked = np.sort(guides.sum(axis=1))[::-1]
    table = result.tables.guide_umis
    assert table["guide_umis"].tolist() == ranked[table["rank"] - 1].tolist()
    assert (table["rank"].iloc[0], table["rank"].iloc[-1]) == (1, 400)
    many = ranked_umis(pd.Series(np.arange(100_000)))
    assert len(many) <= KNEE_POINTS and many["rank"].is_unique
    assert (100_000 - many["rank"] == many["guide_umis"]).all()


def test_quantiles_and_limits_of_a_batch_are_those_of_its_labelled_cells(made):
    result, counts, _ = made
    table = result.tables.batches.set_index(["metric", "batch"])
    assert len(table) == 6
    labelled = ~np.isin(np.arange(400), [*range(4), *range(10, 16)])
    here = labelled & (np.arange(400) < 250)
    size = counts.sum(axis=1, dtype=float)[here]
    row = table.loc[("library_size", "x")]
    assert row["cells"] == here.sum() == 240
    assert row[["p5", "median", "p95"]].tolist() == pytest.approx(np.quantile(size, [0.05, 0.5, 0.95]))
    logged = np.log1p(size)
    median = np.median(logged)
    spread = np.median(np.abs(logged - median))
    limits = np.expm1([median - 5 * spread, median + 5 * spread])
    assert row[["limit_low", "limit_high"]].tolist() == pytest.approx(limits)
    mito = table.loc[("pct_mito", "x")]
    assert np.isnan(mito["limit_low"]) and mito["limit_high"] <= 20
    kept = result.cells.obs["batch"].value_counts()
    assert table.loc["library_size", "cells_kept"].to_dict() == kept.to_dict()
    # What the limits say of a cell is what the filters did to it.
    assert "c7" not in result.cells.obs_names and size.max() > row["limit_high"]


def test_a_fixed_limit_counts_where_it_is_stricter():
    screen, _, _ = guide_screen()
    tables = preprocess_screen(screen, SOURCE, replace(SETTINGS, min_counts=110, max_pct_mito=4.0)).tables
    batches = tables.batches.set_index(["metric", "batch"])
    assert batches.loc[("library_size", "x"), "limit_low"] == 110
    assert batches.loc[("pct_mito", "y"), "limit_high"] == 4
    screen, _, _ = guide_screen()
    off = replace(SETTINGS, mad_threshold=None, max_pct_mito=None)
    limits = preprocess_screen(screen, SOURCE, off).tables.batches[["limit_low", "limit_high"]]
    assert limits.iloc[0].tolist() == [1, pytest.approx(np.nan, nan_ok=True)]
    assert limits.iloc[-1].isna().all()


def test_every_cell_is_in_one_bin(made):
    result, counts, _ = made
    qc = result.qc.set_index("filter")
    for metric, values in {"library_size": counts.sum(axis=1), "n_genes": (counts > 0).sum(axis=1)}.items():
        table = result.tables.distributions
        table = table[table["metric"] == metric]
        assert 1 < len(table) <= BINS
        assert table["bin_low"].iloc[0] == values.min()
        if metric == "n_genes":
            assert (table["bin_high"] - table["bin_low"]).nunique() == 1
            assert values.max() < table["bin_high"].iloc[-1]
        else:
            assert table["bin_high"].iloc[-1] == values.max()
        edges = [*table["bin_low"], table["bin_high"].iloc[-1]]
        assert table["cells"].tolist() == np.histogram(values, edges)[0].tolist()
        assert table["cells"].sum() == 400
        assert table["cells_kept"].sum() == result.cells.n_obs
        quality = [name for name in qc.index if name.startswith(("min_counts", "min_genes", "max_", "mad_"))]
        assert table["cells_low_quality"].sum() == qc.loc[quality, "cells_removed"].sum() > 0


def test_the_filter_of_guides_names_every_number_of_its_rule():
    rules = {
        GuideAssignment(): "dominance, ≥ 5 UMIs",
        GuideAssignment(method="threshold"): "threshold, ≥ 5 UMIs, ≥ 0.2 of top guide",
        GuideAssignment(
            method="mixture", min_posterior=0.8, min_umis=2
        ): "mixture, posterior ≥ 0.8, ≥ 2 UMIs, called share ≥ 0.6",
        GuideAssignment(method="mixture", min_share=0.0): "mixture, posterior ≥ 0.5, ≥ 5 UMIs",
    }
    for calls, rule in rules.items():
        screen, _, _ = guide_screen()
        qc = preprocess_screen(screen, SOURCE, replace(SETTINGS, guide_assignment=calls)).qc
        assert qc.set_index("filter").loc["no_guide", "threshold"] == rule


def test_of_a_screen_with_labels_the_guide_tables_are_headers_alone(tmp_path):
    screen = guide_screen()[0]
    screen = ad.AnnData(X=screen.X, obs=screen.obs, var=screen.var)
    screen.obs["gene"] = np.array(["NT", "A", "B"])[np.arange(400) % 3]
    screen.write_h5ad(tmp_path / "toy.h5ad")
    source = replace(SOURCE, path=str(tmp_path / "toy.h5ad"), perturbation_column="gene", label_pattern="")
    names = ("guide_calls", "guides_per_cell", "guide_umis", "batches", "distributions")
    paths = {name: tmp_path / f"{name}.tsv" for name in ("cells", "qc", "perturbations", "guides", *names)}
    preprocess_file(source, SETTINGS, **paths)
    for name in names:
        table = read_tsv(paths[name])
        assert tuple(table.columns) == getattr(contracts, f"{name.upper()}_COLUMNS")
        assert table.empty == name.startswith("guide")
