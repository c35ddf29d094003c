"""Labels, filters, normalization and the description of effects, each against a second computation."""

import json
import os
import runpy
import subprocess
import sys
import zlib
from dataclasses import fields, replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from biojepa.contracts import CELLS_OBS, PERTURBATION_TABLE_COLUMNS, QC_COLUMNS
from biojepa.errors import InputError
from biojepa.files import sha256_of
from biojepa.guides import GuideAssignment
from biojepa.preprocess import (
    PreprocessSettings,
    Tables,
    preprocess_file,
    preprocess_screen,
    write_preprocessed,
)
from biojepa.preprocess import effects as effects_module
from biojepa.preprocess import quality as quality_module
from biojepa.preprocess.annotate import annotate_cells, guide_targets, label_cells, said_of_many_guides
from biojepa.preprocess.cell_cycle import GENES_FILE
from biojepa.preprocess.effects import (
    TargetExpression,
    count_changed_genes,
    energy_distance,
    energy_test,
    group_by_label,
    principal_components,
    rank_test,
    targeting_guides,
    weak_guides,
)
from biojepa.preprocess.normalize import log_normalize
from biojepa.preprocess.quality import mad_limits, mad_outliers
from biojepa.raw import GUIDE_COUNTS, GUIDE_NAMES, RawScreen, ScreenSource, read_screen
from biojepa.raw import matrix as matrix_module

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow" / "scripts"
MITO = [f"MT-{i}" for i in range(5)]
GENES = [f"G{i}" for i in range(35)] + MITO
SOURCE = ScreenSource(
    "toy",
    "toy.h5ad",
    perturbation_column="gene",
    control_label="NT",
    guide_column="guide",
    batch_column="lane",
    perturbation_type="CRISPRi",
)
FILES = ("cells.h5ad", "qc.tsv", "perturbations.tsv", "guides.tsv")
SETTINGS = PreprocessSettings(
    min_cells_per_perturbation=10, mad_threshold=None, permutations=199, effect_components=5
)


def toy(seed=0):
    """Return 300 cells: G0 is knocked down where it is targeted, G1+G2 shifts ten genes, G3 does nothing."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["NT", "G0", "G2+G1", "G3", "RARE"], [100, 60, 60, 75, 5])
    mean = np.tile(rng.gamma(2.0, 3.0, 40), (300, 1))
    mean[:, :5] = 8.0
    mean[labels == "G0", 0] *= 0.1
    mean[labels == "G2+G1", 10:20] *= 2.5
    counts = rng.poisson(mean * rng.lognormal(0, 0.2, 300)[:, None]).astype(np.float32)
    obs = pd.DataFrame({"gene": labels}, index=[f"c{i}" for i in range(300)])
    obs["lane"] = np.where(np.arange(300) % 2, "a", "b")
    obs["guide"] = [f"{label}_g{i % 3}" for i, label in enumerate(labels)]
    return ad.AnnData(X=sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame({"gene_id": GENES}, index=GENES))


def row(table, column, value):
    return table[table[column] == value].iloc[0]


def test_cells_follow_the_contract():
    screen = toy()
    cells = preprocess_screen(screen, SOURCE, SETTINGS).cells
    assert list(cells.obs.columns[: len(CELLS_OBS)]) == list(CELLS_OBS)
    assert cells.obs["perturbation"].value_counts().to_dict() == {
        "control": 100,
        "G3": 75,
        "G0": 60,
        "G1+G2": 60,
    }
    assert (cells.obs["is_control"] == (cells.obs["perturbation"] == "control")).all()
    assert cells.obs.groupby("perturbation", observed=True)["n_perturbed_genes"].first().to_dict() == {
        "control": 0,
        "G0": 1,
        "G1+G2": 2,
        "G3": 1,
    }
    raw = screen[cells.obs_names, cells.var_names].X.toarray()
    np.testing.assert_array_equal(cells.layers["counts"].toarray(), raw)
    total = screen[cells.obs_names].X.toarray().sum(axis=1)
    np.testing.assert_allclose(cells.obs["library_size"], total)
    np.testing.assert_allclose(cells.X.toarray(), np.log1p(raw / total[:, None] * 1e4), rtol=1e-6)
    mito = screen[cells.obs_names, MITO].X.toarray().sum(axis=1)
    np.testing.assert_allclose(cells.obs["pct_mito"], 100 * mito / total, rtol=1e-6)
    assert cells.X.dtype == cells.layers["counts"].dtype == np.float32
    assert sparse.isspmatrix_csr(cells.X)


def test_library_size_comes_from_the_whole_transcriptome_where_the_file_is_a_panel():
    screen = toy()
    screen.obs["umis"] = 5 * np.asarray(screen.X.sum(axis=1)).ravel() + 7
    source = replace(SOURCE, library_size_column="umis")
    cells = preprocess_screen(screen, source, replace(SETTINGS, target_sum=1000.0)).cells
    expected = np.log1p(
        cells.layers["counts"].toarray() / cells.obs["library_size"].to_numpy()[:, None] * 1000
    )
    np.testing.assert_allclose(cells.obs["library_size"], screen.obs.loc[cells.obs_names, "umis"])
    np.testing.assert_allclose(cells.X.toarray(), expected, rtol=1e-6)


def test_library_size_is_taken_before_genes_are_filtered():
    screen = toy()
    counts = screen.X.toarray()
    counts[:, 34] = 0
    counts[0, 34] = 50
    screen.X = sparse.csr_matrix(counts)
    result = preprocess_screen(screen, SOURCE, SETTINGS)
    assert "G34" not in result.cells.var_names
    assert result.cells.obs.loc["c0", "library_size"] == screen.X[0].sum()
    assert row(result.qc, "filter", "min_cells_per_gene")["note"] == "genes: 40 before, 1 removed, 39 after"


def test_every_lost_cell_is_in_exactly_one_row_of_the_funnel():
    screen = toy()
    screen.obs["gene"] = screen.obs["gene"].astype(object)
    screen.obs.iloc[:4, 0] = None
    counts = screen.X.toarray()
    counts[4:7] = 0
    counts[7, 38] = 5000  # almost nothing but one mitochondrial gene
    screen.X = sparse.csr_matrix(counts)
    result = preprocess_screen(screen, SOURCE, SETTINGS)
    qc = result.qc
    assert tuple(qc.columns) == QC_COLUMNS
    removed = qc.set_index("filter")["cells_removed"]
    assert removed[removed > 0].to_dict() == {
        "unlabelled": 4,
        "min_counts": 3,
        "max_pct_mito": 1,
        "min_cells_per_perturbation": 5,
    }
    assert (qc["cells_before"] - qc["cells_removed"] == qc["cells_after"]).all()
    assert (qc["cells_before"].to_numpy()[1:] == qc["cells_after"].to_numpy()[:-1]).all()
    assert qc["cells_after"].iloc[-1] == result.cells.n_obs == 287
    assert "RARE (5)" in row(qc, "filter", "min_cells_per_perturbation")["note"]


def test_a_perturbed_gene_stays_where_any_cell_has_it():
    screen = toy()
    counts = screen.X.toarray()
    counts[:, [0, 3, 34]] = 0
    counts[5, [0, 34]] = 2  # G0 is perturbed and G34 is not; G3 is perturbed, and in no cell
    screen.X = sparse.csr_matrix(counts)
    result = preprocess_screen(screen, SOURCE, replace(SETTINGS, min_cells_per_gene=3))
    assert {"G0", "G3", "G34"} & set(result.cells.var_names) == {"G0"}
    note = row(result.qc, "filter", "min_cells_per_gene")["note"]
    assert note == "genes: 40 before, 2 removed, 38 after, among them 1 perturbed genes in fewer cells"
    assert row(result.perturbations, "perturbation", "G0")["target_measured"] == "True"


def test_mad_limits_agree_with_scipy_and_hold_within_a_batch():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0, 1, 500), rng.normal(100, 3, 500)])
    values[[3, 700]] = [9.0, 60.0]
    values[5] = np.nan
    batches = np.repeat(["a", "b"], 500)
    expected = np.zeros(1000, dtype=bool)
    for batch in "ab":
        here = batches == batch
        median = np.nanmedian(values[here])
        mad = stats.median_abs_deviation(values[here], nan_policy="omit")
        expected[here] = np.abs(values[here] - median) > 5 * mad
    assert expected[[3, 700]].all()
    assert not expected[5]
    np.testing.assert_array_equal(mad_outliers(values, batches, 5.0), expected)
    upper = mad_outliers(values, batches, 5.0, side="upper")
    assert upper[3]
    assert not upper[700]
    assert not mad_outliers(np.array([1.0, 1, 1, 1, 9]), np.zeros(5), 5.0).any()


def test_batches_of_few_cells_take_the_limits_of_all():
    """Two of three cells are nearly alike, so that the third would go by their own MAD."""
    rng = np.random.default_rng(3)
    values = np.r_[rng.normal(5, 1, 200), 5.0, 5.01, 5.5, 30.0, rng.normal(8, 1, 50)]
    batches = np.repeat(["large", "small", "enough"], [200, 4, 50])
    limits = mad_limits(values, batches, 5.0)
    for name, basis in (("small", values), ("large", values[:200]), ("enough", values[204:])):
        spread = 5 * stats.median_abs_deviation(basis)
        assert limits[name] == pytest.approx((np.median(basis) - spread, np.median(basis) + spread))
    assert np.flatnonzero(mad_outliers(values, batches, 5.0)[200:204]).tolist() == [3]
    screen = toy()
    screen.obs["lane"] = np.where(np.arange(300) < 9, "small", "large")
    source = replace(SOURCE, batch_column="lane")
    qc = preprocess_screen(screen, source, replace(SETTINGS, mad_threshold=5.0)).qc
    note = row(qc, "filter", "mad_counts")["note"]
    assert note == "batches of fewer than 50 cells, judged by all cells together: 1"


def test_mitochondrial_fraction_becomes_percent_and_percent_stays():
    screen = toy()
    screen.obs["mito"] = np.linspace(0, 0.4, 300)
    source = replace(SOURCE, mito_column="mito")
    fraction = preprocess_screen(screen, source, SETTINGS)
    screen.obs["mito"] *= 100
    percent = preprocess_screen(screen, source, SETTINGS)
    assert fraction.cells.obs_names.tolist() == percent.cells.obs_names.tolist()
    assert fraction.cells.obs["pct_mito"].max() <= 20
    assert row(fraction.qc, "filter", "max_pct_mito")["cells_removed"] == 150


def test_a_panel_with_few_mitochondrial_genes_has_no_mitochondrial_share(caplog):
    screen = toy()
    screen.var_names = [f"G{i}" for i in range(36)] + MITO[:4]  # one less than says a share
    counts = screen.X.toarray()
    counts[7, 38] = 5000
    screen.X = sparse.csr_matrix(counts)
    result = preprocess_screen(screen, SOURCE, replace(SETTINGS, mad_threshold=5.0))
    assert result.cells.obs["pct_mito"].isna().all()
    assert "c7" not in result.cells.obs_names  # for its counts, and not for its share
    for name in ("max_pct_mito", "mad_mito"):
        line = row(result.qc, "filter", name)
        assert (line["threshold"], line["cells_removed"]) == ("off", 0)
        assert "no mito_column and 4 MT- genes (MT-0, MT-1, MT-2, MT-3)" in line["note"]
        assert line["note"].endswith("name the column that holds the share in mito_column")
    assert [r.levelname for r in caplog.records if "4 MT- genes" in r.message] == ["WARNING"]
    screen.obs["mito"] = np.linspace(0, 0.4, 300)
    told = preprocess_screen(screen, replace(SOURCE, mito_column="mito"), SETTINGS)
    assert row(told.qc, "filter", "max_pct_mito")["cells_removed"] == 150
    screen.obs["mito"] = np.nan
    blank = preprocess_screen(screen, replace(SOURCE, mito_column="mito"), SETTINGS)
    assert "mito_column is empty" in row(blank.qc, "filter", "max_pct_mito")["note"]


def test_a_depth_that_may_be_of_a_panel_is_noted_where_no_column_says_it(caplog):
    screen = toy()
    screen.obs["umis"] = 5 * np.asarray(screen.X.sum(axis=1)).ravel()
    note = (
        "depth is the sum over 40 genes; if the matrix is part of the transcriptome, name the column "
        "with the depth of the whole in library_size_column"
    )
    panel = preprocess_screen(screen, SOURCE, SETTINGS)
    assert row(panel.qc, "filter", "min_counts")["note"] == note
    assert note in json.loads(panel.cells.uns["provenance"])["notes"]
    assert [r.levelname for r in caplog.records if note in r.message and r.levelname != "INFO"] == ["WARNING"]
    caplog.clear()
    told = preprocess_screen(screen, replace(SOURCE, library_size_column="umis"), SETTINGS)
    assert row(told.qc, "filter", "min_counts")["note"] == ""
    assert note not in json.loads(told.cells.uns["provenance"])["notes"]
    empty = sparse.csr_matrix((300, 1960), dtype=np.float32)
    var = pd.DataFrame(index=GENES + [f"H{i}" for i in range(1960)])
    whole = ad.AnnData(X=sparse.csr_matrix(sparse.hstack([screen.X, empty])), obs=screen.obs, var=var)
    assert row(preprocess_screen(whole, SOURCE, SETTINGS).qc, "filter", "min_counts")["note"] == ""
    assert not any("depth is the sum" in r.message for r in caplog.records)


@pytest.mark.parametrize(("fewest", "rule", "removed"), [(10, "≥ 10 cells", 1), (0, "off", 0)])
def test_the_filter_of_genes_says_the_same_in_the_log_and_in_the_table(caplog, fewest, rule, removed):
    screen = toy()
    counts = screen.X.toarray()
    counts[9:, 39] = 0
    screen.X = sparse.csr_matrix(counts)
    caplog.set_level("INFO")
    line = row(
        preprocess_screen(screen, SOURCE, replace(SETTINGS, min_cells_per_gene=fewest)).qc,
        "filter",
        "min_cells_per_gene",
    )
    assert (line["threshold"], line["cells_removed"]) == (rule, 0)
    assert line["note"] == f"genes: 40 before, {removed} removed, {40 - removed} after"
    (told,) = (r.getMessage() for r in caplog.records if "min_cells_per_gene" in r.getMessage())
    assert told.startswith(f"min_cells_per_gene ({rule}): ")
    assert line["note"] in told


def test_guides_give_the_labels_where_the_file_has_none(tmp_path):
    screen = toy()
    guides = ["G0_g1", "G1_g1", "G2_g1", "NT_g1"]
    counts = np.zeros((300, 4))
    counts[:100, 3] = 20
    counts[100:160, 0] = 20
    counts[160:220, [1, 2]] = 20
    counts[220:225, :3] = 20
    screen.obsm[GUIDE_COUNTS] = sparse.csr_matrix(counts)
    screen.uns[GUIDE_NAMES] = np.array(guides, dtype=object)
    table = tmp_path / "guides.csv"
    table.write_text("guide,target\nG0_g1,G0\nG1_g1,G1\nG2_g1,G2\nNT_g1,NT\n")
    source = replace(SOURCE, perturbation_column="", guide_column="", guide_table=str(table))
    settings = replace(SETTINGS, guide_assignment=GuideAssignment(method="threshold"))
    result = preprocess_screen(screen, source, settings)
    assert result.cells.obs["perturbation"].value_counts().to_dict() == {
        "control": 100,
        "G0": 60,
        "G1+G2": 60,
    }
    assert row(result.qc, "filter", "no_guide")["cells_removed"] == 75
    assert row(result.qc, "filter", "too_many_guides")["cells_removed"] == 5
    pair = row(result.perturbations, "perturbation", "G1+G2")
    assert (pair["n_guides"], pair["guides"]) == (1, "G1_g1;G2_g1")

    low = preprocess_screen(screen, source, SETTINGS)
    assert low.cells.obs["perturbation"].value_counts().to_dict() == {"control": 100, "G0": 60}
    table.write_text("guide,target\nG0_g1,G0\nG1_g1,G1\nNT_g1,NT\n")
    with pytest.raises(InputError, match=r"guides\.csv, column guide: found 1 of 4 guides.*'G2_g1'"):
        preprocess_screen(screen, source, settings)
    with pytest.raises(InputError, match="neither `guide_table` nor `label_pattern`"):
        preprocess_screen(screen, replace(source, guide_table=""), settings)
    by_name = replace(source, guide_table="", label_pattern="_g1$")
    assert preprocess_screen(screen, by_name, settings).cells.obs.equals(result.cells.obs)


def test_on_target_change_agrees_with_the_formula():
    result = preprocess_screen(toy(), SOURCE, SETTINGS)
    cells, table = result.cells, result.perturbations
    assert tuple(table.columns) == PERTURBATION_TABLE_COLUMNS
    assert table["perturbation"].tolist() == ["G0", "G1+G2", "G3"]
    counts, size = cells.layers["counts"].toarray(), cells.obs["library_size"].to_numpy()[:, None]
    scaled = pd.DataFrame(
        counts / size * 1e4, index=cells.obs["perturbation"].astype(str), columns=cells.var_names
    )

    def expected(label, gene):
        perturbed, control = scaled.loc[label, gene], scaled.loc["control", gene]
        p = stats.mannwhitneyu(perturbed, control, method="asymptotic").pvalue
        return np.log2((perturbed.mean() + 0.01) / (control.mean() + 0.01)), p

    single = row(table, "perturbation", "G0")
    assert single["target_measured"] == "True"
    np.testing.assert_allclose(float(single["on_target_log2fc"]), expected("G0", "G0")[0], rtol=1e-4)
    np.testing.assert_allclose(float(single["on_target_p"]), expected("G0", "G0")[1], rtol=1e-3)
    assert float(single["on_target_log2fc"]) < -2.5
    pair = row(table, "perturbation", "G1+G2")
    assert pair["target_measured"] == "True;True"
    found = [float(value) for value in pair["on_target_log2fc"].split(";")]
    np.testing.assert_allclose(found, [expected("G1+G2", gene)[0] for gene in ("G1", "G2")], rtol=1e-4)


def test_unmeasured_targets_leave_their_place_empty():
    screen = toy()
    screen.obs["gene"] = screen.obs["gene"].replace({"G2+G1": "ABSENT+G1", "G0": "GONE"})
    table = preprocess_screen(screen, SOURCE, SETTINGS).perturbations
    pair = row(table, "perturbation", "ABSENT+G1")
    assert pair["target_measured"] == "False;True"
    assert pair["on_target_log2fc"].startswith(";")
    assert row(table, "perturbation", "GONE")["on_target_log2fc"] == ""


def test_perturbations_with_few_guides_are_flagged_and_stay():
    screen = toy()
    guide = screen.obs["guide"].astype(str)
    screen.obs["guide"] = guide.where(~guide.str.startswith("G0_"), "G0_g0")
    result = preprocess_screen(screen, SOURCE, replace(SETTINGS, min_guides_per_perturbation=2))
    few = result.cells.obs.groupby("perturbation", observed=True)["flag_few_guides"].agg(["min", "max"])
    assert (few["min"] == few["max"]).all()
    assert few.index[few["max"]].tolist() == ["G0"]
    default = preprocess_screen(toy(), SOURCE, SETTINGS).cells.obs
    assert not default["flag_few_guides"].any() and len(default) == len(result.cells.obs)


def test_guides_of_the_control_and_of_other_genes_do_not_count():
    cells = [
        ("control", "n1"),
        ("control", "n2;n3"),
        ("A", "a1;n1"),
        ("A", "a2;n2"),
        ("B", "b1"),
        ("A+B", "a1;b1"),
        ("A+B", "a2;b1"),
        ("C+D", "c1;d1"),
        ("E+F", "both1"),
        ("E+F", "both2"),
        ("G", ""),
    ]
    found = targeting_guides(pd.DataFrame(cells, columns=["perturbation", "guide_id"]))
    assert found == {
        "A": (2, ["a1", "a2"]),
        "B": (1, ["b1"]),
        "A+B": (1, ["a1", "a2", "b1"]),
        "C+D": (1, ["c1", "d1"]),
        "E+F": (2, ["both1", "both2"]),
        "G": (0, []),
    }


def test_flags_say_what_is_weak():
    result = preprocess_screen(toy(), SOURCE, SETTINGS)
    table = result.perturbations.set_index("perturbation")
    assert table.loc["G0", "flag"] == ""
    assert table.loc["G3", "flag"] == "weak;target_unchanged"
    for _, entry in table.iterrows():
        p_values = [float(p) for p in entry["on_target_p"].split(";")]
        assert ("target_unchanged" in entry["flag"]) == any(p >= 0.05 for p in p_values)
        assert ("weak" in entry["flag"]) == (entry["effect_q"] >= 0.05)
    weak = result.cells.obs.loc[result.cells.obs["flag_weak_perturbation"], "perturbation"]
    assert set(weak) == {"G3"}
    assert len(weak) == 75
    bad = result.cells.obs.loc[result.cells.obs["flag_weak_guide"], "guide_id"]
    assert set(bad) == {"G3_g0", "G3_g1", "G3_g2"}


@pytest.mark.parametrize(("left", "lowest", "highest"), [(0.5, 0.0, 0.01), (2**-0.5, 0.0, 0.07), (1, 0.6, 1)])
def test_a_guide_is_weak_only_where_its_cells_show_it(left, lowest, highest):
    """Guides of 40 cells that leave a share of their target, which has two transcripts in a control."""
    rng = np.random.default_rng(6)
    n_guides, n_cells = 300, 40
    control = rng.poisson(2, 2000)
    counts = np.concatenate([control, rng.poisson(2 * left, n_guides * n_cells)])
    label = np.repeat(["control", "G"], [2000, n_guides * n_cells])
    guide = np.r_[np.repeat("", 2000), np.repeat([f"g{i}" for i in range(n_guides)], n_cells)]
    obs = pd.DataFrame(
        {"perturbation": label, "guide_id": guide, "perturbation_type": "CRISPRi", "n_perturbed_genes": 1}
    )
    settings = PreprocessSettings(target_sum=10_000)
    target = TargetExpression(
        {"G": np.flatnonzero(label == "G")}, np.arange(2000), pd.Index(["G"]), len(obs), settings
    )
    target.add(0, sparse.csr_matrix(np.log1p(counts[:, None].astype(np.float32))))
    share = len(weak_guides(obs, target, 20)) / n_guides
    assert lowest <= share <= highest
    assert not weak_guides(obs, target, n_cells + 1)


def test_an_activated_target_that_falls_is_flagged():
    table = preprocess_screen(toy(), replace(SOURCE, perturbation_type="CRISPRa"), SETTINGS).perturbations
    assert row(table, "perturbation", "G0")["flag"] == "target_wrong_direction"


def test_energy_distance_agrees_with_all_pairwise_distances():
    rng = np.random.default_rng(3)
    x, y = rng.normal(0, 1, (23, 6)), rng.normal(0.4, 2, (31, 6))

    def within(z):
        return cdist(z, z, "sqeuclidean").sum() / (len(z) * (len(z) - 1))

    expected = 2 * cdist(x, y, "sqeuclidean").mean() - within(x) - within(y)
    np.testing.assert_allclose(energy_distance(x, y), expected)
    np.testing.assert_allclose(energy_distance(y, x), expected)


def test_energy_distance_of_equal_distributions_is_zero_on_average():
    rng = np.random.default_rng(4)
    values = [energy_distance(*rng.normal(0, 1, (2, 20, 10))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20  # three standard errors of the mean of 400
    assert np.min(values) < 0 < np.max(values)


def test_energy_test_agrees_with_scipy_and_is_calibrated():
    rng = np.random.default_rng(5)
    x, y = rng.normal(0, 1, (15, 3)), rng.normal(0.35, 1, (18, 3))
    distance, p = energy_test(x, y, 4000, np.random.default_rng(0))
    assert distance == energy_distance(x, y)
    pooled = np.concatenate([x, y])

    def statistic(a, b):
        return energy_distance(pooled[a.astype(int)], pooled[b.astype(int)])

    second = stats.permutation_test(
        (np.arange(15.0), np.arange(15.0, 33.0)), statistic, n_resamples=2000, alternative="greater", rng=1
    )
    # Two Monte Carlo estimates of the same p; four standard errors of the smaller run.
    assert abs(p - second.pvalue) < 4 * np.sqrt(second.pvalue / 2000)
    null = np.array([energy_test(*rng.normal(0, 1, (2, 15, 3)), 99, rng)[1] for _ in range(1000)])
    for level in (0.05, 0.5):
        error = np.sqrt(level * (1 - level) / 1000)
        assert abs(np.mean(null <= level) - level) < 3 * error


def test_an_effect_size_does_not_depend_on_the_other_perturbations_kept():
    table = preprocess_screen(toy(), SOURCE, replace(SETTINGS, effect_cells=40)).perturbations
    again = preprocess_screen(toy(), SOURCE, replace(SETTINGS, effect_cells=40)).perturbations
    pd.testing.assert_frame_equal(table, again)
    other = preprocess_screen(toy(), SOURCE, replace(SETTINGS, effect_cells=40, seed=1)).perturbations
    assert (other["effect_size"] != table["effect_size"]).all()
    q = stats.false_discovery_control(table["effect_p"])
    np.testing.assert_allclose(table["effect_q"], q)


def test_principal_components_agree_with_singular_values():
    expression = preprocess_screen(toy(), SOURCE, SETTINGS).cells.X
    scores = principal_components(expression, 5, 0)
    dense = expression.toarray().astype(float)
    u, s, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(u[:, :5] * s[:5]), rtol=1e-4, atol=1e-6)


def test_changed_genes_agree_with_welch_where_the_variances_are_equal_or_larger():
    rng = np.random.default_rng(6)
    control, perturbed = rng.normal(0, 1, (80, 30)), rng.normal(0, 2, (40, 30))
    perturbed[:, :10] += 2.0
    expression = sparse.csr_matrix(np.vstack([control, perturbed]))
    p = stats.ttest_ind(perturbed, control, equal_var=False).pvalue
    expected = int((stats.false_discovery_control(p) < 0.05).sum())
    assert 8 <= expected <= 12
    found = count_changed_genes(expression, {"A": np.arange(80, 120)}, np.arange(80))
    assert found == {"A": expected}


def test_the_most_changed_gene_has_its_share_of_the_squared_change():
    result = preprocess_screen(toy(), SOURCE, SETTINGS)
    table = result.perturbations.set_index("perturbation")
    dense = pd.DataFrame(
        result.cells.X.toarray().astype(float), index=result.cells.obs["perturbation"].astype(str)
    )
    mean = dense.groupby(level=0).mean()
    known = table.index[table["n_deg"] > 0]
    assert len(known)
    for name in known:
        square = ((mean.loc[name] - mean.loc["control"]) ** 2).to_numpy()
        # Of these strong effects, the gene that changed most is one of the significant ones.
        assert table.loc[name, "top_gene"] == result.cells.var_names[square.argmax()]
        assert table.loc[name, "top_gene_share"] == pytest.approx(square.max() / square.sum(), rel=1e-6)
    none = table[table["n_deg"] == 0]
    assert (none["top_gene"] == "").all() and none["top_gene_share"].isna().all()


def test_genes_missed_by_chance_do_not_count_as_changed():
    rng = np.random.default_rng(7)
    expression = sparse.csr_matrix((rng.random((1040, 400)) < 0.02).astype(float))
    rows = {"A": np.arange(1000, 1040)}
    undetected = np.asarray(expression[1000:].sum(axis=0)).ravel() == 0
    plain = stats.ttest_ind(expression[1000:].toarray(), expression[:1000].toarray(), equal_var=False).pvalue
    assert undetected.sum() > 100
    assert (plain[undetected] < 1e-3).all()  # what Welch without the floor makes of them
    assert count_changed_genes(expression, rows, np.arange(1000)) == {"A": 0}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    paths = []
    for name in "ab":
        folder = tmp_path / name
        files = [
            folder / "cells.h5ad",
            folder / "qc.tsv",
            folder / "perturbations.tsv",
            folder / "guides.tsv",
        ]
        write_preprocessed(preprocess_screen(toy(), SOURCE, SETTINGS, {"toy.h5ad": "0" * 64}), *files)
        paths.append(files)
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in files)
    for first, second in zip(*paths, strict=True):
        assert first.read_bytes() == second.read_bytes()
    cells = ad.read_h5ad(paths[0][0])
    content = json.loads(cells.uns["provenance"])
    assert content["inputs"] == {"toy.h5ad": "0" * 64}
    assert content["settings"]["guide_assignment"]["method"] == "dominance"
    assert content["source"]["path"] == "toy.h5ad"


def with_guide_counts(screen, seed=9):
    """Give the toy screen guide counts in place of labels; a few cells carry two guides or none."""
    rng = np.random.default_rng(seed)
    names = ["G0_g1", "G0_g2", "G1_g1", "G2_g1", "G3_g1", "NT_g1"]
    carried = {"G0": [0, 1], "G2+G1": [2, 3], "G3": [4], "NT": [5], "RARE": []}
    counts = rng.poisson(0.3, (screen.n_obs, len(names)))
    for cell, label in enumerate(screen.obs["gene"]):
        guides = carried[label] if label != "G0" else [carried[label][cell % 2]]
        counts[cell, guides] += rng.poisson(20, len(guides))
    screen.obsm[GUIDE_COUNTS] = sparse.csr_matrix(counts.astype(np.float32))
    screen.uns[GUIDE_NAMES] = np.array(names, dtype=object)
    return screen


@pytest.mark.parametrize(("max_guides", "controls"), [(40, 30), (40, 0), (2, 30)])
def test_a_screen_of_many_guides_in_each_cell_stops_and_says_so(max_guides, controls):
    """Twelve of forty guides each: no two cells are alike, whatever is accepted."""
    rng, screen = np.random.default_rng(3), toy()
    names = [f"T{i}_g1" for i in range(40)] + ["NT_g1"]
    carried = np.argsort(rng.random((screen.n_obs, 40)), axis=1)[:, :12]
    counts = np.zeros((screen.n_obs, 41), dtype=np.float32)
    np.put_along_axis(counts, carried, 20, axis=1)
    counts[:controls] = 20 * (np.arange(41) == 40)
    screen.obsm[GUIDE_COUNTS] = sparse.csr_matrix(counts)
    screen.uns[GUIDE_NAMES] = np.array(names, dtype=object)
    source = replace(SOURCE, perturbation_column="", label_pattern="_g1$")
    calls = GuideAssignment(method="threshold", max_guides=max_guides)
    with pytest.raises(InputError, match=r"median of 12 guides, and a label names .*lower .*max_guides"):
        preprocess_screen(screen, source, replace(SETTINGS, guide_assignment=calls))


def test_cells_of_few_guides_are_not_said_to_carry_many():
    classes = pd.DataFrame({"status": "assigned", "n_guides": [0, 1, 2, 9], "cells": [90, 30, 40, 20]})
    assert said_of_many_guides(classes) == said_of_many_guides(None) == ""
    classes["cells"] = [90, 3, 4, 20]
    assert "median of 9 guides" in said_of_many_guides(classes)


@pytest.mark.parametrize("entries", [1, 100, 1999])
@pytest.mark.parametrize("kind", ["labels", "guides", "doublets"])
def test_nothing_depends_on_the_size_of_the_blocks(tmp_path, monkeypatch, kind, entries):
    screen, source, settings = toy(), SOURCE, replace(SETTINGS, effect_cells=40, mad_threshold=6.0)
    counts = screen.X.toarray()
    counts[[7, 299]] = 0
    counts[:, 5] = 0
    screen.X = sparse.csr_matrix(counts)
    if kind == "guides":
        table = tmp_path / "guides.csv"
        table.write_text("guide,target\nG0_g1,G0\nG0_g2,G0\nG1_g1,G1\nG2_g1,G2\nG3_g1,G3\nNT_g1,NT\n")
        screen = with_guide_counts(screen)
        source = replace(SOURCE, perturbation_column="", guide_column="", guide_table=str(table))
        settings = replace(settings, guide_assignment=GuideAssignment(method="threshold"))
    if kind == "doublets":
        settings = replace(settings, doublets="scrublet", doublet_threshold=0.3)
    whole = preprocess_screen(screen, source, settings)
    monkeypatch.setattr(matrix_module, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(quality_module, "BATCH_ENTRIES", 10 * entries)
    # Two labels, or one, are summed in each pass.
    monkeypatch.setattr(effects_module, "MOMENTS_ENTRIES", entries)
    cut = preprocess_screen(screen, source, settings)
    assert len(list(RawScreen.of(screen).blocks())) > 4
    assert whole.qc["cells_removed"].sum() > 1
    assert whole.perturbations["perturbation"].tolist() == ["G0", "G1+G2", "G3"]
    pd.testing.assert_frame_equal(cut.qc, whole.qc)
    pd.testing.assert_frame_equal(cut.perturbations, whole.perturbations, check_exact=True)
    pd.testing.assert_frame_equal(cut.cells.obs, whole.cells.obs, check_exact=True)
    assert cut.cells.var.equals(whole.cells.var)
    for one, other in (
        (cut.cells.X, whole.cells.X),
        (cut.cells.layers["counts"], whole.cells.layers["counts"]),
    ):
        np.testing.assert_array_equal(one.indptr, other.indptr)
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(one.data, other.data)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_a_file_gives_what_the_screen_in_memory_gives(tmp_path, monkeypatch, layout):
    screen = toy()
    expected = preprocess_screen(screen, SOURCE, SETTINGS)
    kinds = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda x: x.toarray()}
    screen.X = kinds[layout](screen.X)
    path = tmp_path / "toy.h5ad"
    screen.write_h5ad(path)
    monkeypatch.setattr(matrix_module, "BLOCK_ENTRIES", 500)
    monkeypatch.setattr(matrix_module, "SORTED_ENTRIES", 1000)
    files = [tmp_path / "out" / name for name in FILES]
    preprocess_file(replace(SOURCE, path=str(path)), SETTINGS, *files)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(file.name for file in files)
    cells = ad.read_h5ad(files[0])
    pd.testing.assert_frame_equal(cells.obs, expected.cells.obs)
    np.testing.assert_array_equal(cells.X.toarray(), expected.cells.X.toarray())
    np.testing.assert_array_equal(cells.layers["counts"].toarray(), expected.cells.layers["counts"].toarray())
    pd.testing.assert_frame_equal(pd.read_csv(files[1], sep="\t", keep_default_na=False), expected.qc)
    effects = pd.read_csv(files[2], sep="\t")["effect_size"]
    np.testing.assert_allclose(effects, expected.perturbations["effect_size"], rtol=1e-9)


def test_what_stops_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "toy.h5ad"
    screen = toy()
    screen.X = sparse.csc_matrix(screen.X)
    screen.write_h5ad(path)
    monkeypatch.setattr(matrix_module, "SORTED_ENTRIES", 1000)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(effects_module.Effects, "describe", stop)
    files = [tmp_path / "out" / name for name in FILES]
    with pytest.raises(KeyboardInterrupt):
        preprocess_file(replace(SOURCE, path=str(path)), SETTINGS, *files)
    assert not list((tmp_path / "out").iterdir())


def test_counts_share_the_indices_of_the_expression(tmp_path):
    files = [tmp_path / name for name in FILES]
    path = tmp_path / "toy.h5ad"
    toy().write_h5ad(path)
    preprocess_file(replace(SOURCE, path=str(path)), SETTINGS, *files)
    with h5py.File(files[0]) as file:
        for name in ("indices", "indptr"):
            assert file[f"X/{name}"] == file[f"layers/counts/{name}"]
        assert file["X"].attrs["shape"].tolist() == [295, 40]
    again = tmp_path / "again.h5ad"
    cells = ad.read_h5ad(files[0])
    cells.write_h5ad(again)
    np.testing.assert_array_equal(
        ad.read_h5ad(again).layers["counts"].toarray(), cells.layers["counts"].toarray()
    )


def test_few_controls_stand_for_all_in_the_rank_test_and_all_count_in_the_means(monkeypatch):
    monkeypatch.setattr(effects_module, "TEST_CONTROLS", 30)
    cells = preprocess_screen(toy(), SOURCE, SETTINGS).cells
    rows_of = group_by_label(cells.obs["perturbation"])
    control = rows_of.pop("control")
    target = TargetExpression(rows_of, control, cells.var_names, cells.n_obs, SETTINGS)
    target.add(0, cells.X)
    scaled = np.expm1(cells.X.toarray().astype(np.float64))
    change, p = target.change("G0", rows_of["G0"])
    perturbed = scaled[rows_of["G0"], 0]
    expected = np.log2((perturbed.mean() + 0.01) / (scaled[control, 0].mean() + 0.01))
    assert change == pytest.approx(expected, rel=1e-5)
    seed = [SETTINGS.seed, zlib.crc32(b"on-target test")]
    sampled = np.random.default_rng(seed).choice(control, 30, replace=False)
    reference = stats.mannwhitneyu(perturbed, scaled[sampled, 0], method="asymptotic").pvalue
    assert p == pytest.approx(reference, rel=1e-5)
    assert p > 1e6 * stats.mannwhitneyu(perturbed, scaled[control, 0], method="asymptotic").pvalue
    assert target.change("G9", rows_of["G0"]) is None
    assert target.detected_in_control("G0") == np.mean(scaled[control, 0] > 0)


@pytest.mark.parametrize("seed", range(8))
def test_the_rank_test_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0.05, 3)
    x = rng.poisson(mean * rng.choice([0.5, 1, 2]), rng.integers(2, 80)).astype(float)
    y = rng.poisson(mean, rng.integers(2, 300)).astype(float)
    if seed % 2:  # no ties but the zeros
        x, y = x * rng.uniform(0.9, 1.1, len(x)), y * rng.uniform(0.9, 1.1, len(y))
    expected = stats.mannwhitneyu(x, y, alternative="two-sided", method="asymptotic").pvalue
    assert rank_test(x, y[y > 0], len(y)) == pytest.approx(expected, rel=1e-9)


def test_the_rank_test_of_equal_values_is_1():
    assert rank_test(np.zeros(4), np.array([]), 5) == 1.0
    assert rank_test(np.full(4, 2.0), np.full(5, 2.0), 5) == 1.0


def test_cells_are_grouped_by_label():
    labels = np.array(["b", "a", "control", "b", "a+c", "a"])
    found = group_by_label(pd.Series(pd.Categorical(labels)))
    assert list(found) == sorted(set(labels))
    for name, rows in found.items():
        np.testing.assert_array_equal(rows, np.flatnonzero(labels == name))


def test_a_large_batch_is_scored_for_doublets_in_random_parts(monkeypatch):
    parts = []

    def score(counts, threshold, seed):
        parts.append(counts.toarray())
        return np.asarray(counts.sum(axis=1)).ravel(), None

    monkeypatch.setattr(quality_module, "scrublet_scores", score)
    monkeypatch.setattr(quality_module, "MAX_CELLS_FOR_DOUBLETS", 110)
    monkeypatch.setattr(quality_module, "MIN_CELLS_FOR_DOUBLETS", 10)
    source = replace(SOURCE, batch_column="")
    settings = replace(SETTINGS, doublets="scrublet")
    first = preprocess_screen(toy(), source, settings)
    assert [len(part) for part in parts] == [100, 100, 100]
    # Every cell in one part, and the parts are no runs of cells: they hold perturbations alike.
    counts = toy().X.toarray()
    found = np.concatenate(parts)
    assert sorted(map(tuple, found)) == sorted(map(tuple, counts))
    controls = {tuple(row) for row in counts[:100]}
    assert all(20 < sum(tuple(row) in controls for row in part) < 47 for part in parts)
    cells = first.cells
    assert (
        cells.obs["doublet_score"].tolist()
        == counts.sum(axis=1)[cells.obs_names.str[1:].astype(int)].tolist()
    )
    note = row(first.qc, "filter", "doublets")["note"]
    assert "batch all scored in 3 random parts (more than 110 cells)" in note
    assert "no threshold found in batch all, part 3" in note
    parts.clear()
    again = preprocess_screen(toy(), source, settings)
    np.testing.assert_array_equal(np.concatenate(parts), found)
    pd.testing.assert_frame_equal(again.cells.obs, cells.obs)


def test_scrublet_finds_planted_doublets():
    rng = np.random.default_rng(8)
    kinds = rng.gamma(0.5, 4.0, (2, 60))
    counts = rng.poisson(kinds[np.arange(300) % 2]).astype(np.float32)
    counts[:20] = rng.poisson(kinds.sum(axis=0), (20, 60))
    obs = pd.DataFrame(
        {"gene": np.where(np.arange(300) % 3, "NT", "G0")}, index=[f"c{i}" for i in range(300)]
    )
    screen = ad.AnnData(
        X=sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(60)])
    )
    screen.var["gene_id"] = screen.var_names
    source = ScreenSource("toy", "toy.h5ad", perturbation_column="gene", control_label="NT")
    planted = set(screen.obs_names[:20])
    scored = preprocess_screen(screen, source, replace(SETTINGS, doublets="scrublet", doublet_threshold=1.0))
    assert scored.cells.n_obs == 300
    is_planted = scored.cells.obs_names.isin(planted)
    assert roc_auc_score(is_planted, scored.cells.obs["doublet_score"]) > 0.9

    called = preprocess_screen(screen, source, replace(SETTINGS, doublets="scrublet", doublet_threshold=0.25))
    lost = set(screen.obs_names) - set(called.cells.obs_names)
    assert lost == set(scored.cells.obs_names[scored.cells.obs["doublet_score"] > 0.25])
    assert 5 < len(lost & planted) == len(lost)
    assert row(called.qc, "filter", "doublets")["cells_removed"] == len(lost)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"perturbation_column": "genes"}, r"toy\.h5ad: found no column 'genes'.*did you mean 'gene'"),
        ({"batch_column": "batch"}, r"no column 'batch'.*`batch_column`"),
        ({"library_size_column": "umis"}, r"no column 'umis'.*`library_size_column`"),
        ({"mito_column": "pct"}, r"no column 'pct'.*`mito_column`"),
        (
            {"control_label": "safe"},
            r"column 'gene'.*'safe'; labels called like controls: 'NT' \(100\); .*mean 'NT'\? Set",
        ),
        ({"perturbation_column": ""}, r"no `perturbation_column`.*gene, lane, guide"),
        ({"library_size_column": "lane"}, r"column 'lane', cell 'c0': found 'b'; expected a number"),
    ],
)
def test_a_wrong_row_of_the_dataset_table_is_answered_with_what_is_there(source, message):
    with pytest.raises(InputError, match=message):
        preprocess_screen(toy(), replace(SOURCE, **source), SETTINGS)


def test_a_screen_without_controls_is_refused():
    screen = toy()
    screen = screen[screen.obs["gene"] != "NT"].copy()
    with pytest.raises(
        InputError, match=r"any of the usual control names.*most frequent labels: 'G3' \(75\)"
    ):
        preprocess_screen(screen, replace(SOURCE, control_label=""), SETTINGS)


def test_too_few_cells_are_refused():
    with pytest.raises(InputError, match=r"at most 75 cells for each of 4 perturbations.*min_cells_per_pert"):
        preprocess_screen(toy(), SOURCE, replace(SETTINGS, min_cells_per_perturbation=90))
    with pytest.raises(InputError, match=r"100 control cells after the filters.*at least 120"):
        preprocess_screen(toy(), SOURCE, replace(SETTINGS, min_cells_per_perturbation=120))
    with pytest.raises(InputError, match=r"no gene detected in 400 cells.*min_cells_per_gene"):
        preprocess_screen(toy(), SOURCE, replace(SETTINGS, min_cells_per_gene=400))


def test_library_sizes_that_cannot_be_are_refused():
    screen = toy()
    screen.obs["umis"] = np.asarray(screen.X.sum(axis=1)).ravel()
    source = replace(SOURCE, library_size_column="umis")
    screen.obs.iloc[:151, screen.obs.columns.get_loc("umis")] = 0
    with pytest.raises(
        InputError, match=r"column 'umis': found no positive number for 151 of 300 cells, such as 'c0'"
    ):
        preprocess_screen(screen, source, SETTINGS)
    screen.obs["umis"] = np.asarray(screen.X.sum(axis=1)).ravel()
    screen.obs["umis"] = np.log1p(1.0 + screen.obs["umis"])
    with pytest.raises(InputError, match=r"values below the counts in the matrix.*`library_size_column`"):
        preprocess_screen(screen, source, SETTINGS)
    with pytest.raises(InputError, match=r"1 cells with a library size of 0"):
        log_normalize(sparse.csr_matrix(np.ones((2, 3))), np.array([3.0, 0.0]), 1e4)


def test_na_of_r_is_no_perturbation_and_no_guide():
    screen = toy()
    screen.obs["gene"] = screen.obs["gene"].replace({"RARE": "NA"})
    screen.obs["guide"] = screen.obs["guide"].astype(object)
    screen.obs.iloc[:3, screen.obs.columns.get_loc("guide")] = ["NA", "n/a", None]
    cells = annotate_cells(RawScreen.of(screen), SOURCE, GuideAssignment())
    missing = screen.obs["gene"] == "NA"
    assert cells.obs["perturbation"].isna().tolist() == missing.tolist()
    assert cells.notes["unlabelled"] == "no perturbation in: 'NA' (5 cells)"
    assert cells.obs["guide_id"].iloc[:3].tolist() == ["", "", ""]
    assert cells.obs["guide_id"].iloc[3:].tolist() == screen.obs["guide"].iloc[3:].tolist()


def test_a_guide_column_may_have_cells_without_a_guide_or_a_target(tmp_path):
    table = tmp_path / "guides.csv"
    table.write_text("guide,target\nG0_1,G0\nNT_1,NT\nG3_1,\nG3_2,NA\nother,\n")
    obs = pd.DataFrame(
        {"guide": ["NT_1", "unassigned", "G0_1", None, "G3_1", "NA", "G3_2", "G0_1"]},
        index=[f"c{i}" for i in range(8)],
    )
    screen = ad.AnnData(np.ones((8, 3), dtype=np.float32), obs=obs, var=pd.DataFrame(index=["G0", "G3", "X"]))
    source = ScreenSource("toy", "toy.h5ad", guide_column="guide", guide_table=str(table), control_label="NT")
    cells = label_cells(RawScreen.of(screen), source, GuideAssignment())
    unknown = [None] * 4
    assert cells.obs["perturbation"].tolist() == ["control", None, "G0", *unknown, "G0"]
    assert cells.obs["guide_id"].tolist() == ["NT_1", "", "G0_1", "", "G3_1", "", "G3_2", "G0_1"]
    assert cells.missing_filter == "unlabelled"
    for found in ("'unassigned' (1 cells)", "no label (1 cells)", "'NA' (1 cells)", "'G3_1' (1 cells)"):
        assert found in cells.notes["unlabelled"]
    # Where guides are called from counts, each needs a target.
    with pytest.raises(InputError, match=r"no target for guide 'G3_1'"):
        guide_targets(["G0_1", "NT_1"], source)


def test_cells_without_a_library_size_are_a_line_of_the_funnel():
    screen = toy()
    screen.obs["umis"] = 2.0 * np.asarray(screen.X.sum(axis=1)).ravel()
    whole = preprocess_screen(screen, replace(SOURCE, library_size_column="umis"), SETTINGS)
    assert "no_library_size" not in whole.qc["filter"].tolist()
    column = screen.obs.columns.get_loc("umis")
    screen.obs["umis"] = screen.obs["umis"].astype(object)
    for cell, size in ((3, 0.0), (120, np.nan), (170, "NA"), (200, -5.0)):
        screen.obs.iloc[cell, column] = size
    some = preprocess_screen(screen, replace(SOURCE, library_size_column="umis"), SETTINGS)
    line = row(some.qc, "filter", "no_library_size")
    assert (line["cells_removed"], line["note"]) == (4, "no positive number in column 'umis'")
    assert set(whole.cells.obs_names) - set(some.cells.obs_names) == {"c3", "c120", "c170", "c200"}
    kept = whole.cells[some.cells.obs_names]
    np.testing.assert_array_equal(some.cells.obs["library_size"], kept.obs["library_size"])
    np.testing.assert_array_equal(some.cells.X.toarray(), kept.X.toarray())


def test_another_control_is_left_out_with_a_note():
    screen = toy()
    screen.obs["gene"] = screen.obs["gene"].replace({"RARE": "ctrl"})
    result = preprocess_screen(screen, SOURCE, SETTINGS)
    assert row(result.qc, "filter", "unlabelled")["cells_removed"] == 5
    assert "ctrl (5 cells)" in row(result.qc, "filter", "unlabelled")["note"]
    both = preprocess_screen(screen, replace(SOURCE, control_label="NT;ctrl"), SETTINGS)
    assert both.cells.obs["is_control"].sum() == 105


def test_settings_refuse_unknown_keys_and_values_out_of_range():
    settings = PreprocessSettings.from_mapping({"min_genes": 5, "guide_assignment": {"method": "threshold"}})
    assert (settings.min_genes, settings.guide_assignment) == (5, GuideAssignment(method="threshold"))
    with pytest.raises(InputError, match=r"config, preprocess: found unknown key 'min_gene'.*min_genes"):
        PreprocessSettings.from_mapping({"min_gene": 5})
    with pytest.raises(InputError, match=r"preprocess\.guide_assignment: found unknown key 'umis'.*min_umis"):
        PreprocessSettings.from_mapping({"guide_assignment": {"umis": 5}})
    with pytest.raises(InputError, match=r"preprocess\.doublets.*'yes'.*none or scrublet"):
        PreprocessSettings(doublets="yes")
    with pytest.raises(InputError, match=r"preprocess\.target_sum: found 0.*positive"):
        PreprocessSettings(target_sum=0)


def test_the_script_writes_what_the_library_finds(tmp_path):
    screen = toy()
    path = tmp_path / "toy.h5ad"
    screen.write_h5ad(path)
    source = {**{name: getattr(SOURCE, name) for name in SOURCE.__dataclass_fields__}, "path": str(path)}
    settings = {"min_cells_per_perturbation": 10, "permutations": 19, "effect_components": 5}
    outputs = {"cells": str(tmp_path / "out" / "cells.h5ad")}
    outputs |= {field.name: str(tmp_path / "out" / f"{field.name}.tsv") for field in fields(Tables)}
    code = f"""
import runpy
from types import SimpleNamespace
from snakemake.iocontainers import Namedlist
def named(**content):
    listed = Namedlist(content.values())
    for place, name in enumerate(content):
        listed._set_name(name, place)
    return listed
files = Namedlist([{str(path)!r}, {str(GENES_FILE)!r}])
for name, end in dict(raw=1, cell_metadata=1, guide_table=1, guide_counts=1, guide_calls=1).items():
    files._set_name(name, 0 if name == "raw" else 1, end=end)
files._set_name("cell_cycle_genes", 1)
snakemake = SimpleNamespace(input=files,
    params=named(source={source!r}, settings={settings!r}),
    output=named(**{outputs!r}, record={str(tmp_path / "record.json")!r}),
    log=[{str(tmp_path / "log.txt")!r}], rule="preprocess", wildcards=named(dataset="toy"), config={{}},
    threads=1)
runpy.run_path({str(SCRIPTS / "preprocess.py")!r}, {{"snakemake": snakemake}}, run_name="__main__")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    cells = ad.read_h5ad(outputs["cells"])
    expected = preprocess_screen(
        read_screen(ScreenSource.from_mapping(source)),
        ScreenSource.from_mapping(source),
        PreprocessSettings.from_mapping(settings),
    )
    np.testing.assert_array_equal(cells.X.toarray(), expected.cells.X.toarray())
    assert json.loads(cells.uns["provenance"])["inputs"] == {
        "toy.h5ad": sha256_of(path),
        GENES_FILE.name: sha256_of(GENES_FILE),
    }
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["inputs"] == {str(p): sha256_of(p) for p in (path, GENES_FILE)} and set(
        record["outputs"]
    ) == set(outputs.values())

    failed = subprocess.run(
        [sys.executable, "-c", code.replace("'gene'", "'genes'")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert failed.returncode == 1
    assert "did you mean 'gene'?" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_papalexi_targets_that_are_measured_go_down(papalexi):
    result = preprocess_screen(read_screen(papalexi), papalexi, PreprocessSettings(permutations=19))
    assert row(result.qc, "filter", "too_many_guides")["cells_after"] == 18_826
    table = result.perturbations
    measured = table[table["target_measured"] == "True"]
    assert len(table) == 25
    assert len(measured) == 9
    assert (measured["on_target_log2fc"].astype(float) < 0).all()
    assert float(row(table, "perturbation", "STAT1")["on_target_log2fc"]) == pytest.approx(-2.3, abs=0.1)


def test_norman_labels_and_library_sizes_come_from_their_columns(real_data):
    path = real_data / "norman2019_tiny.h5ad"
    source = ScreenSource(
        "norman",
        str(path),
        perturbation_column="perturbation",
        control_label="control",
        batch_column="batch",
        library_size_column="total_counts_all",
        perturbation_type="CRISPRa",
    )
    result = preprocess_screen(
        read_screen(source), source, PreprocessSettings(permutations=19, mad_threshold=None)
    )
    raw = ad.read_h5ad(path)
    table = result.perturbations.set_index("perturbation")
    expected = {"+".join(sorted(str(label).split("+"))) for label in raw.obs["perturbation"].unique()} - {
        "control"
    }
    assert set(table.index) == expected
    assert (table["n_perturbed_genes"] == 2).sum() == 15
    assert result.cells.n_obs == 3375
    assert table.index[table["target_measured"].str.contains("True")].tolist() == ["TMSB4X"]
    assert float(table.loc["TMSB4X", "on_target_log2fc"]) > 1
    size = raw.obs.loc[result.cells.obs_names, "total_counts_all"].to_numpy(dtype=float)
    counts = raw[:, result.cells.var_names].X.toarray()
    np.testing.assert_allclose(result.cells.X.toarray(), np.log1p(counts / size[:, None] * 1e4), rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "raw", "expected"),
    [
        ("raw/screen.h5ad", ["raw/screen.h5ad"], "raw/screen.h5ad"),
        ("raw/screen.h5ad", ["their/raw/screen.h5ad"], "their/raw/screen.h5ad"),
        (
            "raw/tenx",
            ["their/raw/tenx/barcodes.tsv", "their/raw/cellranger/m.mtx"],
            "their/raw/tenx",
        ),
        (
            "raw/run",
            ["their/raw/run/run/s1/outs/filtered_feature_bc_matrix/matrix.mtx.gz", "their/raw/run/run/s2.h5"],
            "their/raw/run",
        ),
        ("run", ["run/run/s1/matrix.mtx.gz"], "run"),
        ("raw/empty", [], "raw/empty"),
    ],
)
def test_a_screen_is_read_where_the_input_of_the_rule_has_it(path, raw, expected):
    """In a module with a prefix it is elsewhere than the table says; a folder may hold no file."""
    found_at = runpy.run_path(str(SCRIPTS / "preprocess.py"))["found_at"]
    tables = {"cell_metadata": [], "guide_table": ["their/guides.csv"]}
    source = {"dataset": "mine", "path": path, "guide_table": "guides.csv", "cell_metadata": ""}
    wanted = {**source, "path": expected, "guide_table": "their/guides.csv"}
    assert found_at(source, raw, tables) == wanted
