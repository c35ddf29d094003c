"""Scores of the cell cycle, against scanpy."""

import json
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

from biojepa.errors import InputError
from biojepa.files import read_tsv
from biojepa.preprocess import PreprocessSettings, preprocess_screen
from biojepa.preprocess.cell_cycle import GENES_FILE, CellCycle, read_cell_cycle_genes
from biojepa.raw import ScreenSource
from biojepa.raw import matrix as matrix_module

SOURCE = ScreenSource("toy", "toy.h5ad", perturbation_column="gene", control_label="NT")
SETTINGS = PreprocessSettings(
    min_cells_per_perturbation=10,
    min_cells_per_gene=0,
    mad_threshold=None,
    max_pct_mito=None,
    permutations=9,
    effect_components=3,
)
MARKS = read_tsv(GENES_FILE)
S, G2M = (MARKS.loc[MARKS["phase"] == phase, "gene"].tolist() for phase in ("S", "G2M"))


def screen(n_genes, symbols=(*S, *G2M), n_cells=120, seed=0):
    """Return cells of which a third has S genes raised, and a third those of G2M."""
    rng = np.random.default_rng(seed)
    genes = np.array([*symbols, *(f"X{i}" for i in range(n_genes - len(symbols)))])
    rng.shuffle(genes)
    mean = np.tile(rng.gamma(1.0, 2.0, n_genes) + 0.05, (n_cells, 1))
    for third, marks in ((0, S), (1, G2M)):
        mean[np.ix_(np.arange(n_cells) % 3 == third, np.isin(genes, marks))] *= 1.5
    names = [f"c{i}" for i in range(n_cells)]
    obs = pd.DataFrame({"gene": np.repeat(["NT", "X0"], n_cells // 2)}, index=names)
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    return ad.AnnData(X=counts, obs=obs, var=pd.DataFrame({"gene_id": genes}, index=genes))


def test_the_list_is_that_of_the_paper():
    assert (len(S), len(G2M)) == (43, 54)
    assert not set(S) & set(G2M)
    assert {"MCM5", "PCNA", "E2F8"} <= set(S)
    assert {"TOP2A", "MKI67", "CENPA"} <= set(G2M)


def test_scores_and_phases_are_those_of_scanpy_where_a_bin_holds_no_more_than_it_draws():
    # 25 genes in a bin, of which scanpy would draw 43.
    cells = preprocess_screen(screen(600), SOURCE, SETTINGS).cells
    expected = ad.AnnData(X=cells.X.astype(np.float64), obs=cells.obs[[]], var=cells.var)
    sc.tl.score_genes_cell_cycle(expected, s_genes=S, g2m_genes=G2M)
    np.testing.assert_allclose(cells.obs["s_score"], expected.obs["S_score"], atol=1e-6)
    np.testing.assert_allclose(cells.obs["g2m_score"], expected.obs["G2M_score"], atol=1e-6)
    assert cells.obs["phase"].astype(str).tolist() == expected.obs["phase"].tolist()
    assert cells.obs["phase"].value_counts().min() > 10
    assert (cells.obs["phase"].to_numpy()[::3] == "S").mean() > 0.7
    assert (cells.obs["phase"].to_numpy()[1::3] == "G2M").mean() > 0.7


def test_larger_bins_are_taken_whole():
    cells = preprocess_screen(screen(2400), SOURCE, SETTINGS).cells
    expected = ad.AnnData(X=cells.X.astype(np.float64), obs=cells.obs[[]], var=cells.var)
    for genes, name in ((S, "s_score"), (G2M, "g2m_score")):
        sc.tl.score_genes(expected, genes, score_name=name, ctrl_size=10_000)
        np.testing.assert_allclose(cells.obs[name], expected.obs[name], atol=1e-6)


def test_scores_do_not_depend_on_the_size_of_the_blocks(monkeypatch):
    whole = preprocess_screen(screen(300), SOURCE, SETTINGS).cells.obs
    monkeypatch.setattr(matrix_module, "BLOCK_ENTRIES", 700)
    cut = preprocess_screen(screen(300), SOURCE, SETTINGS).cells.obs
    columns = ["s_score", "g2m_score", "phase"]
    pd.testing.assert_frame_equal(cut[columns], whole[columns], check_exact=True)


def test_symbols_of_the_mouse_and_those_of_today_are_known():
    genes = pd.Index(["Mcm5", "PCNA", "Mlf1ip", "CENPU", "JPT1", "Hn1x", "Cdk1"])
    found = read_cell_cycle_genes(genes)
    assert found == {"S": ["Mcm5", "PCNA", "Mlf1ip"], "G2M": ["Cdk1", "JPT1"]}


@pytest.mark.parametrize(("n", "scored"), [(5, True), (4, False)])
def test_too_few_genes_give_a_note_and_no_columns(n, scored, caplog):
    with caplog.at_level(logging.INFO, logger="biojepa"):
        cells = preprocess_screen(screen(200, (*S[:n], *G2M[:9])), SOURCE, SETTINGS).cells
    assert ({"s_score", "g2m_score", "phase"} <= set(cells.obs.columns)) == scored
    assert ("phase" in cells.obs.columns) == scored
    note = next(n for n in json.loads(cells.uns["provenance"])["notes"] if n.startswith("cell cycle"))
    assert note in caplog.text
    assert f"{n} of S, 9 of G2M" in note
    assert (("so no scores" in note), ("MCM5" in note)) == (not scored, scored)


def test_nothing_is_scored_where_the_config_says_no():
    settings = PreprocessSettings.from_mapping({"cell_cycle": False, "min_cells_per_perturbation": 10})
    cells = preprocess_screen(screen(200), SOURCE, settings).cells
    assert "phase" not in cells.obs.columns
    assert not any("cell cycle" in note for note in json.loads(cells.uns["provenance"])["notes"])


def test_a_bin_without_other_genes_leaves_the_mean_of_the_marks():
    genes = pd.Index(["A", "B", "C"])
    cycle = CellCycle(genes, {"S": ["A"], "G2M": ["A", "B", "C"]}, np.array([1.0, 2.0, 3.0]), 2)
    cycle.add(0, sparse.csr_matrix([[3.0, 0.0, 0.0], [0.0, 3.0, 3.0]]))
    # Bins of one gene each.
    np.testing.assert_allclose(cycle.columns()["s_score"], [3, 0])
    np.testing.assert_allclose(cycle.columns()["g2m_score"], [1, 2])
    assert list(cycle.columns()["phase"]) == ["S", "G2M"]


def test_a_damaged_list_is_refused(tmp_path):
    path = tmp_path / "genes.tsv"
    path.write_text("phase\tgene\nS\tPCNA\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"genes\.tsv: found columns phase, gene; expected columns"):
        read_cell_cycle_genes(pd.Index(["PCNA"]), path)
